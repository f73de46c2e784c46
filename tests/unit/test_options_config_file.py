"""``--config_file`` and ``--output_config``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.log import UserError
from library.options.base import OptionSpec
from library.options.config_file import config_path, config_table, read_config, unique_entries, write_config
from library.options.lines import line_of
from library.options.script import parse
from library.options.scripts import TRAIN_NETWORK
from library.options.settings import ScriptOptions
from library.options.toml_file import parse_toml

LOOSE = ScriptOptions("train_network.py", TRAIN_NETWORK.groups)


def write(folder: Path, text: str) -> str:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def read(folder: Path, text: str, *argv: str) -> dict[str, Any]:
    return parse(LOOSE, ["--config_file", write(folder, text), *argv]).as_flat_dict()


def problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        read(folder, text)
    return str(caught.value).replace(str(folder / "run.toml"), "run.toml").splitlines()


def test_suffix_is_appended(tmp_path: Path):
    write(tmp_path, "seed = 5\n")
    assert parse(LOOSE, ["--config_file", str(tmp_path / "run")]).value_of("seed") == 5
    assert config_path("a.b") == Path("a.b.toml")


def test_tables_are_flattened_one_level(tmp_path: Path):
    values = read(
        tmp_path, "seed = 1\n[a]\nnetwork_dim = 2\n[b]\nclip_skip = 3\nlog.logging_dir = 'x'\n".replace("log.", "")
    )
    assert (values["seed"], values["network_dim"], values["clip_skip"], values["logging_dir"]) == (1, 2, 3, "x")
    assert problems(tmp_path, "[a.b]\nseed = 1\n") == [
        "run.toml line 1: [a.b] is a table in a table; put its keys one level up"
    ]


def test_a_key_that_stands_twice_names_both_places(tmp_path: Path):
    text = "[a]\nseed = 1\n\n[b]\nseed = 2\ncaption_extension = '.txt'\ncaption_extention = '.cap'\n"
    assert problems(tmp_path, text) == [
        "run.toml line 5: seed is set already at run.toml line 2; keep one of them",
        "run.toml line 7: caption_extention is set already at run.toml line 6; keep one of them",
    ]


def test_values_in_toml_types(tmp_path: Path):
    text = "resolution = [512, 768]\nface_crop_aug_range = [1, 3.0]\ntext_encoder_lr = 5e-5\nbase_weights = 'a'\n"
    text += "max_train_steps = 10.0\nlearning_rate = 1\nlr_warmup_steps = '10%'\n"
    text += "lr_scheduler = 'cosine'\nnetwork_args = []\n"
    values = read(tmp_path, text)
    assert values["resolution"] == (512, 768)
    assert values["face_crop_aug_range"] == (1.0, 3.0)
    assert values["text_encoder_lr"] == [5e-5]
    assert values["base_weights"] == ["a"]
    assert values["lr_warmup_steps"] == 0.1
    assert values["network_args"] is None
    assert (type(values["max_train_steps"]), type(values["learning_rate"])) == (int, float)


def test_what_the_toml_writer_of_old_could_not_read_is_read(tmp_path: Path):
    assert read(tmp_path, "seed = 0x10\n")["seed"] == 16
    assert read(tmp_path, "text_encoder_lr = [1, 2.5]\n")["text_encoder_lr"] == [1.0, 2.5]


def test_byte_order_mark_and_non_ascii(tmp_path: Path):
    (tmp_path / "run.toml").write_bytes("\ufeffoutput_name = 'Käse 猫'\n".encode())
    assert parse(LOOSE, ["--config_file", str(tmp_path / "run.toml")]).value_of("output_name") == "Käse 猫"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"seed = = 1\n", "line 1"),
        (b'vae = "C:\\Users\\me"\n', "write paths with /"),
        (b"cache_latents = True\n", "small letters"),
        ("vae = “a”\n".encode(), "straight quotes"),
        (b"vae = a/b\n", "straight quotes"),
        (b"output_name = '\xff'\n", "UTF-8"),
        (b"seed = 1\nseed = 2\n", "no valid TOML"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: bytes, part: str):
    (tmp_path / "run.toml").write_bytes(content)
    with pytest.raises(UserError, match=part):
        parse(LOOSE, ["--config_file", str(tmp_path / "run.toml")])


def test_missing_file(tmp_path: Path):
    with pytest.raises(UserError, match=r"--config_file: there is no file .*none\.toml"):
        parse(LOOSE, ["--config_file", str(tmp_path / "none")])


def test_unknown_keys(tmp_path: Path):
    assert problems(tmp_path, "\n\nnetwork_dmi = 1\n") == [
        "run.toml line 3: network_dmi: there is no such option (did you mean network_dim?)"
    ]
    assert "data set file" in problems(tmp_path, "[[datasets]]\nbatch_size = 2\n")[0]
    assert "data set file" in problems(tmp_path, "[general]\nenable_bucket = true\n")[0]


def test_keys_of_other_programs_warn_if_they_change_nothing(tmp_path: Path):
    text = "fp8_base_unet = false\ninitial_epoch = 1\nlr_decay_steps = 0\nepoch = 8\n"
    text += 'log_config = true\nnoise_offset_type = "Original"\n'
    found = parse(LOOSE, ["--config_file", write(tmp_path, text)]).warnings
    assert len(found) == 6
    assert "line 1: fp8_base_unet: ignored" in found[0]


def test_keys_of_other_programs_that_change_the_training_are_refused(tmp_path: Path):
    assert problems(tmp_path, "lr_decay_steps = 5\nfp8_base_unet = true\n") == [
        "run.toml line 1: lr_decay_steps = 5: this program lacks it, and it changes what is trained; take it out",
        "run.toml line 2: fp8_base_unet = true: this program lacks it, and it changes what is trained; take it out",
    ]


def test_lines_of_keys():
    text = 'a = 1\n# b = 2\n"c d" = """\ne = 5\n"""\n[ t ] # x\nf.g=1\n[[u]]\nh = [\n 1,\n]\n  i = 3\n'
    document = parse_toml(text)
    expected = {("a",): 1, ("c d",): 3, ("t",): 6, ("t", "f", "g"): 7, ("u", 0, "h"): 9, ("u", 0, "i"): 12}
    assert {where: line_of(text, False, document, where) for where in expected} == expected


@pytest.mark.parametrize(
    "before", ["o = 'a, i = 1'", 'o = "\\", i = 1"', "o = 1 # {i = 1", "o = '''\ni = 1\n'''", '"i." = 1']
)
def test_a_key_within_a_text_or_a_comment_is_none(before: str):
    text = f"{before}\ni = 2\n"
    assert line_of(text, False, parse_toml(text), ("i",)) == text[: text.index("i = 2")].count("\n") + 1


# --- --output_config --------------------------------------------------------------------------------------------------


def output(path: Path, *argv: str) -> None:
    with pytest.raises(SystemExit) as end:
        parse(LOOSE, [*argv, "--output_config", "--config_file", str(path)])
    assert end.value.code == 0


def test_only_what_differs_is_written_and_no_secret(tmp_path: Path):
    path = tmp_path / "new" / "out.toml"
    secrets = ["--huggingface_token", "hf_1", "--wandb_api_key", "wb_1"]
    output(path, "--seed", "3", "--max_train_steps", "1600", "--v2", "--resolution", "512,768", *secrets)
    text = path.read_text(encoding="utf-8")
    assert text == 'v2 = true\nresolution = "512,768"\nseed = 3\n'
    assert [item.name for item in path.parent.iterdir()] == ["out.toml"]


def test_an_existing_file_is_kept(tmp_path: Path):
    path = Path(write(tmp_path, "seed = 1\n"))
    with pytest.raises(UserError, match="exists already"):
        parse(LOOSE, ["--seed", "2", "--output_config", "--config_file", str(path)])
    assert path.read_text(encoding="utf-8") == "seed = 1\n"


def test_output_without_a_file_does_not_start_a_training():
    with pytest.raises(UserError, match="--config_file"):
        parse(LOOSE, ["--output_config"])


def test_wrong_values_are_not_written(tmp_path: Path):
    with pytest.raises(UserError, match="must be a whole number"):
        parse(LOOSE, ["--seed", "x", "--output_config", "--config_file", str(tmp_path / "a.toml")])
    assert list(tmp_path.iterdir()) == []


TEXTS = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda t: t.lower() != "none"
)
LIMITED = {"min_timestep", "max_timestep", "bucket_reso_steps"}


def values_of(spec: OptionSpec) -> st.SearchStrategy[Any]:
    """Valid values of an option that stand in no conflict with other options."""
    if spec.choices:
        one: st.SearchStrategy[Any] = st.sampled_from(spec.choices)
    elif spec.is_flag:
        one = st.booleans()
    elif spec.told.pairs:
        one = TEXTS.map(lambda text: f"k={text}")
    elif spec.kind is str:
        one = TEXTS
    elif spec.kind is int:
        one = st.integers(8, 500)
    else:
        above_0 = spec.told.bounds.gt is not None
        one = st.floats(0, 0.99, allow_subnormal=False, exclude_min=above_0)
    return st.lists(one, min_size=1, max_size=3) if spec.is_list else one


ORDINARY = {
    name: values_of(spec) | (st.none() if spec.is_optional else st.nothing())
    for name, spec in LOOSE.specs().items()
    if spec.told.convert is None and spec.kind is not Path and not spec.told.secret and name not in LIMITED
    and name not in ("config_file", "output_config")
}  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries({}, optional=ORDINARY))
def test_what_is_written_is_read_back(chosen: dict[str, Any]):
    specs = LOOSE.specs()
    checked = {name: specs[name].check(value) for name, value in chosen.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.toml"
        write_config(path, config_table(LOOSE, checked))
        found, problems_found = unique_entries(read_config(path)[0], {})
    assert problems_found == []
    for name, spec in specs.items():
        value = spec.check(found[name].value) if name in found else spec.default
        assert value == checked.get(name, spec.default), name
