"""A reader follows the documents: every command runs, in its order, and leaves what it promises.

The reader's own files stand under the names that the documents use: the built-in model for SD 1.x, a toy SDXL, small
pictures. ``WALKS`` says of each command what it must leave, ``NOT_RUN`` which ones cannot run here. A new command of a
document needs a row in one of them. docs/lora_tools.md and docs/data_preparation.md are walked in modules of their own.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.models.control import save_control_file
from library.options.script import parse
from library.options.scripts import SCRIPTS
from tests.control_fixtures import toy_control
from tests.guides import DOCUMENTS, FENCE, Row, check_command, commands_of, relative, rows_of, run_command
from tests.guides import script_and_options as split
from tests.house.source_map import ROOT
from tests.lllite_fixtures import write_begun
from tests.toy import toy_spec, write_toy_checkpoint
from tests.training.runs import metadata

TINY = ROOT / "examples" / "tiny" / "tiny-sd1.safetensors"
SD, SDXL = "models/v1-5-pruned-emaonly.safetensors", "models/sd_xl_base_1.0.safetensors"
# Added to every training: one step, at the size of the small models, with what a CPU has.
ONE_STEP = (
    "--max_train_epochs None --max_train_steps 1 --max_data_loader_n_workers 0 --mixed_precision no"
    " --optimizer_type AdamW --no-gradient_checkpointing"
)
SMALL = f"{ONE_STEP} --resolution 64 --min_bucket_reso 32 --max_bucket_reso 512 --train_batch_size 1"
PAIR = f"{ONE_STEP} --train_batch_size 2"
DRAW = "--steps 2 --W 64 --H 64 --sampler euler"
PLAN = "needed in all"


def begin_run(folder: Path) -> None:
    """The training whose state is resumed, without its last step."""
    assert run_command("train_network.py --config_file examples/lora_sd15.toml", ONE_STEP) == 0


def drawn_earlier(folder: Path) -> None:
    assert run_command("gen_img.py --ckpt model.safetensors --prompt 'a red star' --seed 1 --outdir drawn", DRAW) == 0
    (folder / "outputs").mkdir()
    (drawn,) = (folder / "drawn").glob("*.png")
    drawn.rename(folder / "outputs" / "im_20260101120000_000_1.png")


def same_again(folder: Path) -> None:
    first, again = sorted((folder / "outputs").glob("*.png"))
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(again)))


def trained_networks(folder: Path) -> None:
    """Two epochs of a LoRA."""
    words = f"{SMALL} --network_module networks.lora --train_data_dir data/my_subject_folders"
    output = f"--output_dir output --output_name cat --pretrained_model_name_or_path {SD}"
    assert run_command("train_network.py", f"{words} {output}") == 0
    shutil.copy("output/cat.safetensors", "output/cat-000001.safetensors")


def trained_fish(folder: Path) -> None:
    """The LoRA of the quickstart."""
    alone = "--no-sample_at_first --sample_every_n_steps None --train_batch_size 1"
    assert run_command("train_network.py --config_file examples/quickstart.toml", f"{ONE_STEP} {alone}") == 0


def old_training(folder: Path) -> None:
    shutil.copy("my_lora.toml", "my_old_training.toml")


def net_for_sd(folder: Path) -> None:
    write_toy_checkpoint(folder / "toy.safetensors")
    save_control_file(folder / "canny.safetensors", toy_control(), toy_spec().unet)


def net_for_sdxl(folder: Path) -> None:
    write_begun(folder / "canny.safetensors")


def edges(folder: Path) -> None:
    """The canny tool gave each image its edges: black and white."""
    pictures = [np.asarray(Image.open(path)) for path in (folder / "data" / "edges").glob("*.png")]
    assert len(pictures) == 2
    assert {int(value) for picture in pictures for value in np.unique(picture)} == {0, 255}


def both_caches(folder: Path) -> None:
    assert len(list(folder.glob("data/**/*_te_outputs.npz"))) == 2


def only_deep_blocks(folder: Path) -> None:
    dims = json.loads(metadata(folder / "output/my_lora_sdxl/my_lora_sdxl.safetensors")["ss_network_args"])
    assert dims["block_dims"].startswith("0,0,0,0,0,0,0,16")


WORD = "--max_train_steps 1"
TWO_EACH = "--steps 2 --images_per_prompt 2"
CANNY = Row("data/edges --thres1 63 --thres2 191", ("data/edges/*.png",), after=edges)
CONTROLNET = "output/my_controlnet/my_controlnet.safetensors"
WALKS: dict[str, tuple[Row, ...]] = {
    "docs/getting_started.md": (
        Row("my_lora.toml --dry_run", says=PLAN, more=SMALL),
        Row("my_lora.toml --debug_dataset", ("output/my_lora/debug_dataset/*.png",), more=SMALL),
        Row("train_network.py --config_file my_lora.toml", ("output/my_lora/my_lora.safetensors",), more=SMALL),
    ),
    "docs/performance.md": (Row("benchmarks/all.py", says="missed, 0 not run", more="--only help"),),
    "docs/migrating.md": (
        Row("my_old_training.toml --dry_run", says=PLAN, more=SMALL, before=old_training),
        Row("--max_train_steps 2 --dry_run", says=PLAN),
    ),
    "docs/train_network.md": (
        Row(
            "examples/quickstart.toml",
            ("output/quickstart/fish.safetensors", "fish_previews.png", "output/quickstart/sample/*.png"),
            more=f"{PAIR} --sample_every_n_steps 1",
        ),
        Row("--output_config --network_dim 8", ("new.toml",)),
        Row("cache_latents.py --config_file examples/lora_sd15.toml", ("data/**/*.npz",), more="--mixed_precision no"),
        Row(
            "launch tools/cache_text_encoder_outputs.py --config_file my_sdxl_training.toml",
            ("data/my_subject_folders/*/*_te_outputs.npz",),
            more="--mixed_precision no",
        ),
        Row(
            "--resume output/my_lora/my_lora-state",
            ("output/my_lora/my_lora.safetensors", "output/my_lora/my_lora_previews.png", "my_lora-state/state.json"),
            "resumed output/my_lora/my_lora-state at step 1 of 2",
            f"{ONE_STEP} --max_train_steps 2 --allow_mismatch",
            before=begin_run,
        ),
    ),
    "docs/gen_img.md": (
        Row("--outdir output/pictures", ("output/pictures/im_*.png",), more="--steps 2"),
        Row("000_1.png", ("outputs/im_*.png",), before=drawn_earlier, after=same_again),
        Row("--outdir output/sheet", ("output/sheet/im_*.png", "sheet/*grid*.png"), more=TWO_EACH),
        Row("--grid_weights 0,0.5,1", ("outputs/im_*.png", "outputs/*grid*.png"), more=DRAW, before=trained_networks),
    ),
    "docs/control.md": (
        Row("--control_net_preps canny", ("outputs/*.png",), more=f"--ckpt toy.safetensors {DRAW}", before=net_for_sd),
        Row("--output edges.png --thres1 63 --thres2 191", ("edges.png",)),
        Row("--guide_image_path edges.png", ("outputs/*.png",), "", DRAW, before=net_for_sdxl),
        CANNY,
        Row("lllite_sdxl.toml --dry_run", says="after pictures of data/edges", more=SMALL),
        Row(
            "examples/lllite_sdxl.toml",
            ("output/my_lllite/my_lllite.safetensors", "my_lllite-state/state.json"),
            more=f"{SMALL} --cond_emb_dim 8 --network_dim 6",
        ),
        Row("controlnet_sd15.toml --dry_run", says=PLAN, more=SMALL),
        Row("launch train_controlnet.py --config_file examples/controlnet_sd15.toml", (CONTROLNET,), more=SMALL),
        Row(
            f"--control_net_models {CONTROLNET} --outdir output/pictures",
            ("output/pictures/*.png",),
            more=f"--ckpt {SD} --guide_image_path data/edges/00000.png {DRAW}",
        ),
        Row(
            "--output_name my_controlnet_xl",
            ("my_controlnet_xl/config.json", "my_controlnet_xl/*.safetensors"),
            more=f"{SMALL} --gradient_accumulation_steps 1",
        ),
    ),
    "docs/masked_training.md": (
        Row("--masked_loss --dry_run", says=PLAN, more=SMALL),
        Row("examples/masked_dataset.toml --masked_loss", ("my_lora/my_lora.safetensors",), more=SMALL),
        Row("data/my_subject_masks", ("output/my_dreambooth/my_dreambooth.safetensors",), "", SMALL),
    ),
    "docs/sdxl.md": (
        Row("sdxl_train_network.py --config_file examples/lora_sdxl.toml", ("my_lora_sdxl.safetensors",), more=SMALL),
        Row("lora_sdxl.toml --dry_run", says=PLAN, more=SMALL),
        Row("--text_encoder_lr 2e-5 1e-5", ("my_lora_sdxl.safetensors",), more=SMALL),
        Row("0,0,0,0,0,0", ("my_lora_sdxl.safetensors",), more=SMALL, after=only_deep_blocks),
        Row("full_sdxl.toml", ("output/my_sdxl/my_sdxl.safetensors",), more=f"{SMALL} --optimizer_type AdaFactor"),
    ),
    "docs/textual_inversion.md": (
        Row("launch train_textual_inversion.py --config_file examples/tiny/word.toml", ("word/mygrey.pt",), more=WORD),
        Row("--outdir output/word/drawn", ("output/word/drawn/*.png",), more="--steps 2"),
        Row("textual_inversion_sd15.toml --dry_run", says=PLAN, more=SMALL),
        Row("--output_dir output/layers", ("output/layers/mygrey.safetensors",), more=WORD),
        Row("--outdir output/layers/drawn", ("output/layers/drawn/*.png",), more="--steps 2"),
    ),
    "docs/train_db.md": (
        Row("dreambooth_sd15.toml", ("my_dreambooth.safetensors", "my_dreambooth-state/state.json"), more=SMALL),
        Row("tiny/dreambooth.toml", ("fish-model.safetensors", "*previews.png"), more=PAIR),
        Row("data/my_class_folders/1_dog", ("data/my_class_folders/1_dog/*.png",), "", f"{DRAW} --images_per_prompt 2"),
    ),
    "docs/fine_tune.md": (
        Row("full_sd15.toml", ("my_fine_tune.safetensors", "my_fine_tune-ema.safetensors"), more=SMALL),
    ),
    "examples/tiny/README.md": (
        Row("--scales 1 2 3 5 7 9", says="guidance scale 9", more="--count 1 --steps 2"),
        Row("--subject moon --count 12", ("output/moon/10_sks/*.png", "output/moon/10_sks/*.txt")),
        Row("--subject fish --scales 3", says="guidance scale 3", more="--count 1 --steps 2", before=trained_fish),
        Row("--count 24000", ("output/tiny/scenes/*.png", "output/tiny/scenes.json"), more="--count 4"),
        Row("tools/train_tiny_vae.py", ("output/tiny/start.safetensors", "output/tiny/vae_1.pt"), more="--steps 1"),
        Row("tiny/train.toml", ("output/tiny/tiny-sd1.safetensors",), more=PAIR),
    ),
    "docs/architecture.md": (Row("tools/make_option_docs.py", says="up to date", more="--check"),),
}  # fmt: skip
INSTALLS = "installs packages and makes an environment; tests/house/test_quickstart.py has its parts"
TWO_GPUS = "accelerate launch --multi_gpu --num_processes 2"
NOT_RUN: dict[str, str] = {
    "python quickstart.py": INSTALLS,
    "python quickstart.py --test": INSTALLS,
    "python -m venv .venv": INSTALLS,
    ".venv/bin/python -m pip install torch": INSTALLS,
    ".venv/bin/python -m pip install -r requirements.txt -c requirements.lock": INSTALLS,
    f"{TWO_GPUS} tools/cache_text_encoder_outputs.py --config_file my_sdxl_training.toml": "needs two GPUs",
    f"{TWO_GPUS} train_network.py --config_file examples/lora_sd15.toml": "needs two GPUs",
}
ELSEWHERE = {
    "docs/lora_tools.md": "tests.networks.test_lora_tools_docs",
    "docs/data_preparation.md": "tests.training.test_data_preparation",
}


@pytest.fixture(scope="module")
def sdxl_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_checkpoint(tmp_path_factory.mktemp("sdxl") / "toy.safetensors", "sdxl")


def write_images(folder: Path, count: int = 2) -> None:
    """Pictures of fish with captions in text files."""
    folder.mkdir(parents=True)
    for path in sorted((ROOT / "examples" / "fish" / "10_sks").glob("*.png"))[:count]:
        for file in (path, path.with_suffix(".txt")):
            shutil.copy(file, folder / file.name)


def write_masks(images: Path, masks: Path) -> None:
    """The left half of each picture counts."""
    masks.mkdir(parents=True)
    for path in images.glob("*.png"):
        mask = Image.new("L", (64, 64), 0)
        mask.paste(255, (0, 0, 32, 64))
        mask.save(masks / path.name)


def write_data(folder: Path) -> None:
    """The folders that the examples and guides name."""
    data = folder / "data"
    names = "my_subject_folders/10_sks dog", "my_class_folders/1_dog", "my_lora/5_sks person", "my_subject"
    for name in (*names, "my_subject_closeups", "my_subject_cutouts", "dogs", "images"):
        write_images(data / name)
    write_images(data / "my_images", 12)
    captions = {path.stem: {"caption": "a dog, outside"} for path in (data / "my_images").glob("*.png")}
    (data / "my_captions.json").write_text(json.dumps(captions))
    write_masks(data / "my_subject", data / "my_subject_masks")
    with Image.open(data / "my_subject" / "00000.png") as picture:
        picture.save(folder / "photo.jpg")


def write_configurations(folder: Path) -> None:
    """Copies of the examples with short prompts, and the files that guides tell to write."""
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("photos", "*.safetensors"))
    for path in (TINY, ROOT / "examples" / "photos"):
        (folder / path.relative_to(ROOT)).symlink_to(path)
    for path in (folder / "examples").rglob("*prompts.txt"):
        short = re.sub(r"--s \d+|--[whd] [\d,]+", "", path.read_text()).splitlines()[:2]
        path.write_text(
            "".join(f"{line}\n" if line.startswith("#") else f"{line} --s 2 --w 64 --h 64\n" for line in short)
        )
    for path in (folder / "examples").glob("*dataset.toml"):
        small = re.sub(
            "^(resolution|max_bucket_reso) = .*|^min_bucket_reso.*", r"\1 = 64", path.read_text(), flags=re.M
        )
        path.write_text(re.sub("^ = 64$", "", small, flags=re.M))
    guide = (ROOT / "docs" / "getting_started.md").read_text("utf-8")
    (told,) = [body for language, body in FENCE.findall(guide) if language == "toml"]
    (folder / "my_lora.toml").write_text(told)
    sdxl = (ROOT / "examples" / "lora_sdxl.toml").read_text("utf-8")
    (folder / "my_sdxl_training.toml").write_text(sdxl)


@pytest.fixture
def reader(tmp_path: Path, sdxl_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a reader who has a copy of the examples, two models and pictures."""
    (tmp_path / "models").mkdir()
    for name in (SD, "model.safetensors"):
        (tmp_path / name).symlink_to(TINY)
    for name in (SDXL, "sdxl.safetensors"):
        (tmp_path / name).symlink_to(sdxl_file)
    write_data(tmp_path)
    write_configurations(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("document", WALKS)
def test_every_command_keeps_its_promise(document: str, reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said() -> str:
        return "".join(capsys.readouterr())

    for command in commands_of(ROOT / document):
        if command not in NOT_RUN:
            started = time.process_time()
            (row,) = rows_of(command, WALKS[document])
            check_command(command, row, reader, said)
            with capsys.disabled():
                print(f"{time.process_time() - started:5.1f} s of a core: {command}")


def test_every_command_stands_in_one_table() -> None:
    shown = {relative(document): commands_of(document) for document in DOCUMENTS}
    for document, commands in shown.items():
        if document in ELSEWHERE:
            assert importlib.util.find_spec(ELSEWHERE[document])
            continue
        for command in commands:
            found = len(rows_of(command, WALKS.get(document, ()))) + (command in NOT_RUN)
            assert found == 1, f"{document}: {command}: {found} rows in WALKS and NOT_RUN"
    for document, rows in WALKS.items():
        unused = [row.end for row in rows if not any(rows_of(command, [row]) for command in shown[document])]
        assert not unused, f"{document} shows no such commands: {unused}"
    assert NOT_RUN.keys() <= {command for commands in shown.values() for command in commands}


@pytest.mark.parametrize("command", [command for command in NOT_RUN if split(command)[0] not in ("", "quickstart.py")])
def test_what_is_not_run_is_accepted(command: str, reader: Path) -> None:
    script, options = split(command)
    parse({row.name: row for row in SCRIPTS}[script], options)
