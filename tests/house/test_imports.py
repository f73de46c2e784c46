"""The direction of imports, and the packages that may be imported at all."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.house.source_map import ROOT, Import, files_of_tests, imports_of, module_graph, module_name, source_files

# Rooms from the ground up: a module may import from its own room and from rooms with a lower number.
LAYERS = {
    "library.options": 0,
    "library.log": 0,
    "library.command": 0,
    "library.device": 0,
    "library.interrupt": 0,
    "library.rng": 0,
    "library.plugin": 0,
    "library.data.records": 0,
    "library.models.spec": 0,
    "library.checkpoint.io": 0,  # whole-or-absent writes are for everybody
    "library.checkpoint.pickles": 0,
    "library.checkpoint": 1,
    "library.hub": 1,
    "library.diffusion": 1,
    "library.text": 1,
    "library.models": 1,
    "library.data": 1,
    "library.scenes": 1,
    "library.families": 2,
    "library.generation": 3,
    "library.preparation": 3,
    "library.training": 4,
}
SCRIPT_LAYER = 5
GROUND = 0
NETWORKS_MAY_IMPORT = ("networks", "library.checkpoint", "library.models.spec", "library.log", "library.rng")
EDITING = "networks.editing"
NO_HEAVY_IMPORTS = ("library.options", "library.log", "library.rng", "library.data.records", "quickstart")
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "cv2", "numpy", "PIL", "tensorboard", "bitsandbytes"}
# Imported name -> name in the requirements, where the two differ.
DISTRIBUTIONS = {
    "cv2": "opencv-python-headless",
    "PIL": "pillow",
    "huggingface_hub": "huggingface-hub",
    "lion_pytorch": "lion-pytorch",
    "lycoris": "lycoris-lora",
    "tomli_w": "tomli-w",
}
# Installed by the user if wanted; imported only inside functions. torch is chosen by the user, see README.md.
OPTIONAL = {"torch", "xformers", "bitsandbytes", "wandb", "intel_extension_for_pytorch", "deepspeed", "triton"}
OPTIONAL |= {"onnxruntime", "anime_face_detector"}
OPTIONAL |= {"pillow_jxl", "pillow_avif", "pillow_heif"}
OPTIONAL |= {"dadaptation", "lion_pytorch", "prodigyopt", "schedulefree", "lycoris"}


def layer_of(module: str) -> int | None:
    """The room's number; None for modules outside ``library``."""
    parts = module.split(".")
    for length in range(len(parts), 1, -1):
        layer = LAYERS.get(".".join(parts[:length]))
        if layer is not None:
            return layer
    return None


def is_own(target: str) -> bool:
    return target.split(".")[0] in ("library", "networks", "tools", "benchmarks", "finetune")


def own_modules() -> set[str]:
    return {module_name(path) for path in source_files()}


def own_imports(path: Path) -> list[Import]:
    known = own_modules()
    return [item for item in imports_of(path) if item.target in known]


def test_every_library_module_stands_in_a_known_room():
    strays = [name for name in own_modules() if name.startswith("library.") and layer_of(name) is None]
    assert not strays, f"give these a row in LAYERS: {strays}"


def test_imports_point_downwards():
    wrong: list[str] = []
    for path in source_files():
        here = layer_of(module_name(path))
        for item in own_imports(path) if here is not None else []:
            there = layer_of(item.target)
            if there is not None and there > here:
                wrong.append(f"{path.relative_to(ROOT)}:{item.line} imports {item.target}")
    assert not wrong, "\n".join(wrong)


def test_rooms_of_one_floor_are_apart():
    """Rooms beside each other may meet only through the ground and through checkpoint files."""
    allowed = {"library.checkpoint"}
    wrong: list[str] = []
    for path in source_files():
        name = module_name(path)
        if layer_of(name) != 1:
            continue
        room = ".".join(name.split(".")[:2])
        for item in own_imports(path):
            other = ".".join(item.target.split(".")[:2])
            if layer_of(item.target) == 1 and other != room and other not in allowed and not item.typing_only:
                wrong.append(f"{path.relative_to(ROOT)}:{item.line} imports {item.target}")
    assert not wrong, "\n".join(wrong)


def test_library_never_imports_networks_tools_or_scripts():
    wrong = [
        f"{path.relative_to(ROOT)}:{item.line} imports {item.target}"
        for path in source_files()
        if module_name(path).startswith("library")
        for item in imports_of(path)
        if item.target.split(".")[0] in ("networks", "tools", "benchmarks", "tests", "quickstart")
    ]
    assert not wrong, "\n".join(wrong)


def test_networks_stand_beside_the_families():
    wrong = [
        f"{path.relative_to(ROOT)}:{item.line} imports {item.target}"
        for path in source_files()
        # Ready-made tools among them are scripts: they may use whatever a script may.
        if module_name(path).startswith("networks.") and "__main__" not in path.read_text("utf-8")
        if not module_name(path).startswith(EDITING)
        for item in own_imports(path)
        if not item.target.startswith(NETWORKS_MAY_IMPORT) and item.target != "library"
    ]
    assert not wrong, "\n".join(wrong)


def test_what_tools_do_to_networks_stands_apart():
    """networks.editing may use all of library below training; no adapter and nothing of library may use it."""
    wrong: list[str] = []
    for path in source_files():
        name = module_name(path)
        is_tool = "__main__" in path.read_text("utf-8") or not name.startswith(("networks.", "library."))
        for item in own_imports(path):
            above = name.startswith(EDITING) and item.target.startswith("library.training")
            from_below = item.target.startswith(EDITING) and not is_tool and not name.startswith(EDITING)
            if above or from_below:
                wrong.append(f"{path.relative_to(ROOT)}:{item.line} imports {item.target}")
    assert not wrong, "\n".join(wrong)


def test_no_import_circles():
    graph = module_graph()
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            pytest.fail("import circle: " + " -> ".join([*trail[trail.index(name) :], name]))
        if name not in done:
            for target in sorted(graph[name]):
                walk(target, (*trail, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def test_ground_stays_light():
    wrong = [
        f"{path.relative_to(ROOT)}:{item.line} imports {item.target}"
        for path in source_files()
        if module_name(path).startswith(NO_HEAVY_IMPORTS)
        for item in imports_of(path)
        if item.target.split(".")[0] in HEAVY and not item.late and not item.typing_only
    ]
    assert not wrong, "\n".join(wrong)


def required_names(*files: str) -> set[str]:
    """Package names of requirement files, normalised."""
    lines = [line for file in files for line in (ROOT / file).read_text("utf-8").splitlines()]
    found = [re.match(r"[A-Za-z0-9._-]+", line) for line in lines]
    return {match[0].lower().replace("_", "-") for match in found if match}


def third_party(path: Path) -> list[Import]:
    names = set(sys.stdlib_module_names) | {"library", "networks", "tools", "benchmarks", "tests"}
    names |= {script.stem for script in ROOT.glob("*.py")}
    return [item for item in imports_of(path) if item.target and item.target.split(".")[0] not in names]


def test_what_is_imported_is_required():
    required = required_names("requirements.txt")
    wrong: list[str] = []
    for path in source_files():
        for item in third_party(path):
            top = item.target.split(".")[0]
            known = DISTRIBUTIONS.get(top, top) in required or top in OPTIONAL
            late_enough = top not in OPTIONAL or top == "torch" or item.late or item.typing_only
            if not (known and late_enough):
                wrong.append(f"{path.relative_to(ROOT)}:{item.line} imports {top}")
    assert not wrong, "not in requirements.txt, or an optional package imported at the top:\n" + "\n".join(wrong)


def test_what_is_required_is_used_and_locked():
    imported = {
        item.target.split(".")[0] for path in [*source_files(), *files_of_tests()] for item in third_party(path)
    }
    used = {DISTRIBUTIONS.get(name, name).lower().replace("_", "-") for name in imported}
    # Not imported by us: accelerate writes TensorBoard files with it; old interpreters need it.
    used |= {"tensorboard", "tomli"}
    assert required_names("requirements.txt") <= used
    locked = required_names("requirements.lock")
    assert required_names("requirements.txt", "requirements-dev.txt") <= locked


def test_lock_fits_the_ranges():
    packaging = pytest.importorskip("packaging.requirements")
    ranges = [
        packaging.Requirement(line.split("#")[0].strip())
        for file in ("requirements.txt", "requirements-dev.txt")
        for line in (ROOT / file).read_text("utf-8").splitlines()
        if line.split("#")[0].strip()
    ]
    locked = [
        packaging.Requirement(line)
        for line in (ROOT / "requirements.lock").read_text("utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    for wanted in ranges:
        for pin in locked:
            if pin.name == wanted.name.lower().replace("_", "-"):
                version = str(pin.specifier).removeprefix("==")
                assert wanted.specifier.contains(version), f"{pin} is outside {wanted}"
