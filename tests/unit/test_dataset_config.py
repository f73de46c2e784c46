"""The data set file: every key at every level, fallbacks, and what is said about mistakes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from library.data.records import DatasetKind, DatasetSpec
from library.data.spec import load_dataset_specs
from library.data.spec_checks import uncacheable_subsets
from library.data.spec_keys import KEYS, names_at
from library.log import UserError
from library.options.data import DataOptions

SMALL = """
[[datasets]]
resolution = 512
[[datasets.subsets]]
image_dir = "a"
"""


def load(folder: Path, text: str, name: str = "d.toml", **options: Any) -> tuple[DatasetSpec, ...]:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return load_dataset_specs(DataOptions(dataset_config=path, **options))


def problems(folder: Path, text: str, name: str = "d.toml", **options: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(folder, text, name, **options)
    return [line.replace(f"{folder}/", "") for line in str(caught.value).split("\n")]


def test_nearest_table_wins(tmp_path: Path) -> None:
    text = """
        [general]
        keep_tokens = 1
        flip_aug = true
        caption_separator = ";"
        batch_size = 3

        [[datasets]]
        resolution = [512, 768]
        keep_tokens = 2
          [[datasets.subsets]]
          image_dir = "a"
          keep_tokens = 0
          flip_aug = false
          caption_prefix = ""
          [[datasets.subsets]]
          image_dir = "b"
          num_repeats = 4

        [[datasets]]
        batch_size = 5
          [[datasets.subsets]]
          image_dir = "a"
    """
    first, second = load(
        tmp_path,
        text,
        resolution=256,
        caption_prefix="cli",
        shuffle_caption=True,
        dataset_repeats=7,
        train_batch_size=9,
    )
    assert (first.batch_size, second.batch_size) == (3, 5)
    assert first.buckets is not None
    assert second.buckets is not None
    assert (first.buckets.resolution, second.buckets.resolution) == ((512, 768), (256, 256))
    a, b = first.subsets
    assert [s.captions.keep_tokens for s in (a, b, second.subsets[0])] == [0, 2, 1]
    assert [s.augmentation.flip_aug for s in (a, b)] == [False, True]
    assert [s.captions.caption_prefix for s in (a, b)] == ["", "cli"], "an empty text in the file is a value"
    assert [s.num_repeats for s in (a, b)] == [7, 4]
    assert all(s.captions.shuffle_caption and s.captions.caption_separator == ";" for s in (a, b))


EXAMPLES: dict[str, Any] = {
    "resolution": [512, 640], "caption_separator": ";", "keep_tokens_separator": "|||", "secondary_separator": ";;;",
    "caption_prefix": "p", "caption_suffix": "s", "face_crop_aug_range": [1, 3], "caption_extension": ".txt",
    "class_tokens": "cat", "image_dir": "x", "metadata_file": "m.json", "bucket_reso_steps": 64,
    "conditioning_data_dir": "c",
    "min_bucket_reso": 256, "max_bucket_reso": 1024,
}  # fmt: skip


@pytest.mark.parametrize("kind", list(DatasetKind))
@pytest.mark.parametrize("level", ["general", "dataset", "subset"])
def test_every_key_is_accepted_where_it_belongs(level: Any, kind: DatasetKind, tmp_path: Path) -> None:
    names = names_at(level, None if level == "general" else kind)
    assert len(names) >= 20
    flags = {"enable_bucket", "bucket_no_upscale", "is_reg", "alpha_mask"}
    values = {n: EXAMPLES.get(n, n in flags or n.endswith("_aug") or n in ("shuffle_caption", "random_crop",
              "enable_wildcard") or 1) for n in names}  # fmt: skip
    required = {
        DatasetKind.DREAMBOOTH: {"image_dir": "x"},
        DatasetKind.FINETUNE: {"metadata_file": "m.json"},
        DatasetKind.CONTROL: {"image_dir": "x", "conditioning_data_dir": "c"},
    }[kind]
    subset = {**required, **(values if level == "subset" else {})}
    dataset = {"resolution": 512, **(values if level == "dataset" else {}), "subsets": [subset]}
    document = {"general": values if level == "general" else {}, "datasets": [dataset]}
    (tmp_path / "d.json").write_text(json.dumps(document), encoding="utf-8")
    masks = kind is not DatasetKind.CONTROL
    (spec,) = load_dataset_specs(DataOptions(dataset_config=tmp_path / "d.json"), frozenset(DatasetKind), masks=masks)
    assert spec.kind is kind
    assert spec.subsets[0].captions.caption_separator == ";"
    assert spec.subsets[0].augmentation.face_crop_aug_range == (1.0, 3.0)


def test_values_reach_the_records(tmp_path: Path) -> None:
    text = """
        [[datasets]]
        resolution = "640,512"
        enable_bucket = true
        network_multiplier = 1
        bucket_reso_steps = 32
          [[datasets.subsets]]
          image_dir = "a"
          is_reg = true
          class_tokens = ""
          caption_extension = "txt"
          face_crop_aug_range = [1, 3]
          token_warmup_step = 1
          caption_dropout_rate = 1
    """
    (spec,) = load(tmp_path, text, prior_loss_weight=0.5)
    subset = spec.subsets[0]
    assert spec.buckets is not None
    assert (spec.buckets.resolution, spec.buckets.bucket_reso_steps) == ((640, 512), 32)
    assert (spec.network_multiplier, spec.prior_loss_weight) == (1.0, 0.5)
    assert (subset.is_reg, subset.class_tokens, subset.caption_extension) == (True, "", ".txt")
    assert subset.augmentation.face_crop_aug_range == (1.0, 3.0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("num_repeat = 3", "num_repeat is not known (did you mean num_repeats?)"),
        ('num_repeats = "x"', "num_repeats is 'x': must be a whole number"),
        ("num_repeats = true", "num_repeats is true: must be a whole number"),
        ("num_repeats = -1", "num_repeats is -1: must be 0 (leave the subset out) or more"),
        ("flip_aug = 1", "flip_aug is 1: must be true or false"),
        ("caption_dropout_rate = 1.5", "caption_dropout_rate is 1.5: must be from 0 to 1"),
        ("caption_separator = ''", "caption_separator is '': must not be empty"),
        ("face_crop_aug_range = [3, 1]", "face_crop_aug_range is [3, 1]: must be two positive numbers"),
        ("batch_size = 2", "batch_size does not belong here; put it into [general] or [[datasets]]"),
        ("metadata_file = 1", "metadata_file is 1: must be text"),
        ("conditioning_data_dir = 'c'", "ControlNet data sets are not for this script"),
    ],
)
def test_mistakes_are_named_with_their_line(line: str, message: str, tmp_path: Path) -> None:
    found = problems(tmp_path, f"{SMALL}# num_repeats = 1\n{line}\n")
    assert len(found) == 1
    assert found[0].startswith("d.toml line 7: datasets[0].subsets[0]." if "metadata" not in line else "d.toml line")
    assert message in found[0]


def test_all_mistakes_at_once_each_at_its_own_place(tmp_path: Path) -> None:
    text = """[general]
shuffle = true
[[datasets]]
resolution = 0
  [[datasets.subsets]]
  keep_tokens = -1
  [[datasets.subsets]]
  image_dir = "a"
  keep_tokens = 2
[[datasets]]
  subsets = [{ image_dir = "a", keep_tokens = "b" }]
"""
    found = problems(tmp_path, text)
    assert [line.split(":")[0] for line in found] == [f"d.toml line {number}" for number in (2, 4, 5, 6, 11)]
    assert "image_dir is missing" in found[2]


def test_lines_of_json(tmp_path: Path) -> None:
    lines = [
        '{"datasets": [',
        '{"resolution": 512,',
        '"subsets": [',
        '{"image_dir": "a", "keep_tokens": 1},',
        '{"image_dir": "b",',
        '"keep_tokens": null}]}]}',
    ]
    (found,) = problems(tmp_path, "\n".join(lines), "d.JSON")
    assert found.startswith("d.JSON line 6: datasets[0].subsets[1].keep_tokens is null: must have a value")


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("a = \n", "d.toml", "at line 1"),
        ("{", "d.json", "line 1"),
        ("", "d.yaml", "must end in .toml or .json"),
        ("", "d.toml", "datasets must be a list of at least one table"),
        ("[[datasets]]\nresolution = 512", "d.toml", "subsets must be a list of at least one table"),
        ("[[datasets]]\nsubsets = []", "d.toml", "subsets must be a list of at least one table"),
        ("[datasets]\nsubsets = []", "d.toml", "datasets must be a list"),
        ("[[dataset]]\n[[datasets]]", "d.toml", "dataset is not known (did you mean datasets?)"),
        ("[]", "d.json", "must be a table"),
        ('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"', "d.toml", "resolution is missing"),
        (
            '[[datasets]]\n[[datasets.subsets]]\nimage_dir="a"\n[[datasets.subsets]]\nmetadata_file="b"',
            "d.toml",
            "put the two kinds into separate [[datasets]]",
        ),
        (
            '[[datasets]]\n[[datasets.subsets]]\nmetadata_file="b"\nclass_tokens="x"',
            "d.toml",
            "class_tokens has no meaning in a finetune data set",
        ),
        (SMALL.replace("512", "128\nenable_bucket = true"), "d.toml", "min_bucket_reso 256 is above"),
        (SMALL.replace("512", "2048\nenable_bucket = true"), "d.toml", "max_bucket_reso 1024 is below"),
        (SMALL.replace("512", "512\nbucket_reso_steps = 20"), "d.toml", "a multiple of 8"),
    ],
)
def test_files_that_cannot_be_used(text: str, name: str, message: str, tmp_path: Path) -> None:
    found = problems(tmp_path, text, name)
    assert any(message in line for line in found), found


def test_no_upscale_does_not_mind_the_limits(tmp_path: Path) -> None:
    (spec,) = load(tmp_path, SMALL.replace("512", "128\nenable_bucket = true\nbucket_no_upscale = true"))
    assert spec.buckets is not None
    assert spec.buckets.resolution == (128, 128)


def test_kinds_may_stand_in_one_file_but_not_for_every_script(tmp_path: Path) -> None:
    text = SMALL + '[[datasets]]\n[[datasets.subsets]]\nmetadata_file = "m.json"\n'
    first, second = load(tmp_path, text)
    assert (first.kind, second.kind, second.buckets) == (DatasetKind.DREAMBOOTH, DatasetKind.FINETUNE, None)
    with pytest.raises(UserError, match="finetune data sets are not for this script"):
        load_dataset_specs(DataOptions(dataset_config=tmp_path / "d.toml"), frozenset({DatasetKind.DREAMBOOTH}))


def test_what_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = SMALL + (
        'resize_interpolation = "area"\n[[datasets.subsets]]\nimage_dir = "./a"\n'
        '[[datasets.subsets]]\nimage_dir = "b"\nnum_repeats = 0\n'
    )
    with caplog.at_level(logging.WARNING):
        (spec,) = load(tmp_path, text)
    assert [subset.name for subset in spec.subsets] == ["a"]
    told = caplog.text
    assert "resize_interpolation" in told
    assert "./a: left out, because it stands twice" in told
    assert "b: left out, because it has 0 repeats" in told


def test_utf8_with_mark_and_without(tmp_path: Path) -> None:
    (spec,) = load(tmp_path, "\ufeff" + SMALL.replace('"a"', '"絵"'))
    assert spec.subsets[0].image_dir == "絵"
    (tmp_path / "bad.toml").write_bytes(b"# \xff")
    with pytest.raises(UserError, match="not UTF-8"):
        load_dataset_specs(DataOptions(dataset_config=tmp_path / "bad.toml"))


def test_folders_tell_repeats_and_class_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("20_sls frog", "2_b_c", "10", "notes", "0_off", ".hidden"):
        (tmp_path / "train" / name).mkdir(parents=True)
    (tmp_path / "train" / "file.txt").write_text("")
    (tmp_path / "reg" / "1_frog").mkdir(parents=True)
    options = DataOptions(
        train_data_dir=str(tmp_path / "train"), reg_data_dir=str(tmp_path / "reg"), resolution=512, dataset_repeats=9
    )
    with caplog.at_level(logging.WARNING):
        (spec,) = load_dataset_specs(options)
    found = [(Path(s.name).name, s.num_repeats, s.class_tokens, s.is_reg) for s in spec.subsets]
    assert found == [
        ("10", 10, "", False), ("20_sls frog", 20, "sls frog", False), ("2_b_c", 2, "b_c", False),
        ("1_frog", 1, "frog", True),
    ]  # fmt: skip
    assert "'notes' is passed over" in caplog.text
    assert "0_off: left out" in caplog.text


def test_folder_roots_that_give_nothing(tmp_path: Path) -> None:
    options = DataOptions(train_data_dir=str(tmp_path), reg_data_dir=str(tmp_path / "none"), resolution=512)
    with pytest.raises(UserError) as caught:
        load_dataset_specs(options)
    train, reg = str(caught.value).split("\n")
    assert "no folder named like '10_name'" in train
    assert "cannot be read" in reg
    with pytest.raises(UserError, match="no training images: give --dataset_config"):
        load_dataset_specs(DataOptions())


def test_metadata_from_the_command_line(tmp_path: Path) -> None:
    (spec,) = load_dataset_specs(DataOptions(in_json="m.json", train_data_dir="t", dataset_repeats=3))
    subset = spec.subsets[0]
    assert (spec.kind, subset.metadata_file, subset.image_dir, subset.num_repeats) == (
        DatasetKind.FINETUNE, "m.json", "t", 3,
    )  # fmt: skip


def test_augmentation_that_forbids_a_latent_cache(tmp_path: Path) -> None:
    specs = load(tmp_path, SMALL + "color_aug = true\nflip_aug = true\n")
    assert uncacheable_subsets(specs) == ("a: color_aug cannot go with cached latents; switch one of them off",)


def test_every_shared_option_is_a_key() -> None:
    assert {"batch_size", "num_repeats", "caption_separator", "resolution"} <= set(KEYS)
    assert not {"train_batch_size", "dataset_repeats", "max_token_length", "prior_loss_weight"} & set(KEYS)


def test_the_guide_knows_every_key_and_its_example_loads(project_root: Path, tmp_path: Path) -> None:
    guide = (project_root / "docs" / "dataset_config.md").read_text(encoding="utf-8")
    assert [name for name in KEYS if f"`{name}`" not in guide] == []
    example = guide.split("```toml\n")[1].split("```")[0]
    first, second = load(tmp_path, example)
    assert [subset.is_reg for subset in first.subsets] == [False, True]
    assert (first.kind, second.kind) == (DatasetKind.DREAMBOOTH, DatasetKind.FINETUNE)
