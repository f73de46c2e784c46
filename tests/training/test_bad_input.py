"""Wrong data and options end with status 1 and clear lines, before weights are read or latents are made."""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.training import session
from tests.training.bench import Bench, refused
from tests.training.runs import tensors
from tools import cache_latents

# ---- data


def no_prefix(bench: Bench) -> Path:
    bench.images().rename(bench.tmp / "data" / "sks thing")
    return bench.tmp / "data"


def loose_images(bench: Bench) -> Path:
    for image in (folder := bench.images()).iterdir():
        image.rename(folder.parent / image.name)
    folder.rmdir()
    return folder.parent


def empty_subfolder(bench: Bench) -> Path:
    (bench.tmp / "data" / "3_cat").mkdir(parents=True)
    return bench.tmp / "data"


def empty(bench: Bench) -> Path:
    (bench.tmp / "data").mkdir()
    return bench.tmp / "data"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda bench: bench.tmp / "nowhere", ("--train_data_dir", "nowhere", "No such file")),
        (lambda bench: bench.file("data", "x"), ("--train_data_dir", "Not a directory")),
        (empty, ("--train_data_dir", "no folder named like '10_name'")),
        (no_prefix, ("--train_data_dir", "no folder named like '10_name'")),
        (loose_images, ("--train_data_dir", "named like '10_name'", "move the 2 images")),
        (empty_subfolder, ("3_cat", "no images in the folder")),
    ],
    ids=["missing", "file", "empty", "no_prefix", "loose_images", "empty_subfolder"],
)
def test_folders(bench: Bench, make: Callable[[Bench], Path], words: tuple[str, ...]):
    refused(bench, (), *words, data=make(bench))


def test_no_captions(bench: Bench):
    """Class tokens of the folder's name are captions enough, but that is said; without them it is refused."""
    folder = bench.images()
    for file in folder.glob("*.caption"):
        file.unlink()
    config = bench.file("d.toml", f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{folder}"\n')
    refused(bench, ("--dataset_config", config), str(folder), "no image has a caption file", "--allow_captionless")
    assert bench.run("--dry_run", data=folder.parent) == 0
    assert "2 of 2 images have no caption and get 'sks thing'" in bench.capsys.readouterr().err


def test_captions_under_another_ending_are_not_passed_over(bench: Bench):
    folder = bench.images()
    options = ("--caption_extension", ".txt")
    refused(bench, options, str(folder), "2 .caption files", "set caption_extension", data=folder.parent)


def test_augmentations_that_change_pixels_do_not_go_with_cached_latents(bench: Bench):
    folder = bench.images()
    rules = f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{folder}"\nclass_tokens = "a"\n'
    config = bench.file("d.toml", rules + "color_aug = true\n")
    refused(bench, ("--dataset_config", config, "--cache_latents"), str(folder), "color_aug cannot go with cached")
    words = ["--pretrained_model_name_or_path", "missing.safetensors", "--dataset_config", str(config)]
    assert cache_latents.main([*words, "--cache_latents_to_disk"]) == 1
    assert "color_aug cannot go with cached" in bench.capsys.readouterr().err


def cut_short(image: bytes) -> bytes:
    return image[: len(image) // 2]


def twenty_thousand_wide(image: bytes) -> bytes:
    """The header of a PNG of 20,000 x 20,000 pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    return image[:12] + head + struct.pack(">I", zlib.crc32(head)) + image[33:]


def one_pixel(_: bytes) -> bytes:
    image = Image.new("RGB", (1, 1))
    return image._repr_png_()


BAD_IMAGES = {
    "cut": (cut_short, "cut short"),
    "1x1": (one_pixel, "1x1 pixels are too few"),
    "20000px": (twenty_thousand_wide, "20000x20000 pixels are too many"),
    "empty": (lambda _: b"", "the file is empty"),
    "text": (lambda _: b"hello", "no image of a known format"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_unusable_images(bench: Bench, name: str):
    change, reason = BAD_IMAGES[name]
    image = bench.images() / "photo1.png"
    image.write_bytes(change(image.read_bytes()))
    refused(bench, (), str(image), reason, data=image.parents[1])
    assert bench.run("--on_bad_image", "skip", "--dry_run", data=image.parents[1]) == 0
    said = bench.capsys.readouterr().err
    assert f"{image}: left out" in said
    assert reason in said


def test_all_unusable_files_are_listed_at_once(bench: Bench):
    folder = bench.images(3)
    (folder / "photo0.png").write_bytes(b"hello")
    (folder / "photo1.caption").write_bytes(b"\xff\xfe\x00")
    lines = bench.refusal(data=folder.parent)
    assert len(lines) == 2
    assert any("photo0.png" in line for line in lines)
    assert any("photo1.caption" in line and "UTF-8" in line for line in lines)
    assert bench.run("--on_bad_caption", "skip", "--on_bad_image", "skip", data=folder.parent) == 0
    assert list(tensors(bench.out / "toy.safetensors"))


def test_skipping_everything_leaves_nothing_to_train_on(bench: Bench):
    folder = bench.images(1)
    (folder / "photo0.png").write_bytes(b"hello")
    refused(bench, ("--on_bad_image", "skip"), "no training images", data=folder.parent)


@pytest.mark.parametrize("cache", [(), ("--cache_latents",)], ids=["pixels", "latents"])
def test_damage_that_only_decoding_shows(bench: Bench, cache: tuple[str, ...]):
    image = bench.images() / "photo0.png"  # with this seed the second in the epoch
    content = bytearray(image.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(40)
    image.write_bytes(content)
    options = (*cache, "--max_train_steps", "2")
    assert bench.run(*options, data=image.parents[1]) == 1
    said = bench.capsys.readouterr().err
    assert str(image) in said.partition("error: ")[2]
    assert "--on_bad_image skip" in said
    assert not (bench.out / "toy.safetensors").exists()
    states = list(bench.out.glob("*-state"))
    assert len(states) == (0 if cache else 1)  # what was learned before is not lost
    more = ("--resume", states[0]) if states else ()
    assert bench.run(*options, "--on_bad_image", "skip", *more, data=image.parents[1]) == 0
    assert str(image) in bench.capsys.readouterr().err


# ---- options


def write_lone_latents(folder: Path, *names: str) -> Path:
    """Latents of 64 x 64 pixels without images and mirrors, and the metadata file that names them."""
    for name in names:
        latents = np.random.default_rng(1).normal(size=(4, 8, 8)).astype(np.float32)
        np.savez(folder / f"{name}.npz", latents=latents, original_size=np.array([64, 64]), crop_ltrb=np.zeros(4))
    entries = {name: {"caption": name, "train_resolution": [64, 64]} for name in names}
    (folder / "meta.json").write_text(json.dumps(entries))
    return folder / "meta.json"


def test_latents_without_images_that_do_not_fit(bench: Bench):
    """All are named before the training, not one when its turn has come, and not as a damaged image."""
    meta = write_lone_latents(bench.tmp, "a", "b")
    lines = bench.refusal("--in_json", meta, "--flip_aug", late=True, data=bench.tmp)
    assert [Path(line.split(": ")[0]).name for line in lines[:-1]] == ["a.npz", "b.npz"]
    assert all("no image beside these latents" in line and "mirror" in line for line in lines[:-1])
    (bench.tmp / "b.npz").write_bytes(b"PK")
    assert bench.run("--in_json", meta, "--on_bad_image", "skip", data=bench.tmp) == 0
    assert "b.npz: there is no image beside these latents" in bench.capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\nnetwork_dimm = 4\n", ("x.toml line 2", "network_dimm", "did you mean network_dim?")),
        ('train_batch_size = "two"\n', ("x.toml line 1", "train_batch_size", "whole number")),
        ('shuffle_caption = "yes"\n', ("x.toml line 1", "shuffle_caption", "true or false")),
        ("learning_rate = [1, 2]\n", ("x.toml line 1", "learning_rate", "must be a number")),
        ("seed = 1\nsave_every_n_steps = 0\n", ("x.toml line 2", "save_every_n_steps", "1 or more")),
        ("seed = 1\nseed = 2\n", ("--config_file", "x.toml", "line 2")),
        ("seed =\n", ("--config_file", "x.toml", "no valid TOML", "line 1")),
    ],
)
def test_config_file(bench: Bench, text: str, words: tuple[str, ...]):
    refused(bench, ("--config_file", bench.file("x.toml", text)), *words)


def test_several_mistakes_of_a_config_file_are_told_at_once(bench: Bench):
    path = bench.file("x.toml", 'network_dimm = 4\ntrain_batch_size = "two"\nlearning_rate = -1\n')
    lines = bench.refusal("--config_file", path)
    assert {re.search(r"line (\d)", line).group(1) for line in lines} == {"1", "2", "3"}  # type: ignore[union-attr]


NUMBERS = [
    "learning_rate=-1", "learning_rate=nan", "learning_rate=inf", "train_batch_size=0", "max_train_steps=0",
    "max_train_epochs=-1", "network_dim=0", "network_alpha=-1", "resolution=0", "resolution=64,-64", "clip_skip=0",
    "gradient_accumulation_steps=0", "save_every_n_steps=0", "vae_batch_size=0", "network_dropout=1.5",
    "max_grad_norm=-1", "seed=-1", "noise_offset=-1", "caption_dropout_rate=2", "max_data_loader_n_workers=-1",
    "max_token_length=100", "lr_warmup_steps=-1", "max_timestep=0", "sample_every_n_steps=-1", "keep_tokens=-1",
]  # fmt: skip


@pytest.mark.parametrize("option", NUMBERS)
def test_numbers_out_of_range(bench: Bench, option: str):
    refused(bench, (f"--{option}",), f"--{option.replace('=', ' ')}", "must be ")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--resolution", "5"), ("resolution 5x5", "at least 8 pixels")),
        (("--enable_bucket",), ("min_bucket_reso 256", "above the resolution 64x64")),
        (("--dataset_class", "no_such_module_of_a_test.Data"), ("--dataset_class", "cannot be imported")),
        (("--clip_skip", "5"), ("--clip_skip 5", "2 layers")),
        (("--fp8_base",), ("--fp8_base needs --mixed_precision",)),
        (("--mixed_precision", "fp16"), ("--mixed_precision fp16", "CPU", "bf16")),
        (("--xformers",), ("--xformers", "leave it out")),
        (("--lernin_rate", "1"), ("--lernin_rate", "did you mean learning_rate?")),
        (("--output_name", "a/b"), ("--output_name a/b", "--output_dir")),
        (("--output_name", ".."), ("--output_name ..", "--output_dir")),
        (("--output_name", "x" * 300), ("--output_name", "too long")),
        (("--optimizer_type", "AdamWW"), ("--optimizer_type AdamWW", "did you mean AdamW?")),
        (("--optimizer_type", "prodigi"), ("--optimizer_type prodigi", "did you mean Prodigy?")),
        (("--optimizer_type", "nosuch.Thing"), ("--optimizer_type nosuch.Thing", "no module nosuch")),
        (("--optimizer_type", "json.JSONDecoder"), ("is not an optimizer class",)),
        (("--optimizer_args", "betaz=(0.9,0.99)"), ("--optimizer_args", "AdamW has no argument betaz", "betas")),
        (("--optimizer_args", "betas=(1.9,0.99)"), ("AdamW refuses its arguments", "1.9")),
        (("--optimizer_args", "betas=foo"), ("--optimizer_args", "'betas=foo'", "no Python literal")),
        (("--optimizer_args", "betas"), ("--optimizer_args", "'betas'", "key=value")),
        (("--optimizer_args", "capturable=True"), ("AdamW", "no step can be made", "--optimizer_args", "capturable")),
        (("--lr_scheduler", "cosinus"), ("--lr_scheduler cosinus", "did you mean cosine?")),
        (("--lr_scheduler_type", "nosuch.Thing"), ("--lr_scheduler_type nosuch.Thing",)),
        (("--lr_scheduler_type", "LRScheduler"), ("--lr_scheduler_type LRScheduler refuses",)),
        (("--lr_scheduler", "cosine", "--lr_scheduler_args", "num_cycles='a'"), ("--lr_scheduler cosine",)),
        (("--lr_scheduler", "inverse_sqrt", "--lr_scheduler_args", "timescale=-5"), ("timescale=-5", "above 0")),
        (("--optimizer_type", ".AdamW"), ("--optimizer_type .AdamW", "no such optimizer")),
        (("--optimizer_args", "betas=(0.9,)"), ("AdamW refuses its arguments",)),
        (("--network_module", ".lora"), ("--network_module .lora", "package.module")),
        (("--lr_scheduler_type", "CosineAnnealingLR"), ("--lr_scheduler_args", "T_max")),
        (("--network_module", "networks.nosuch"), ("--network_module", "networks.nosuch")),
        (("--network_module", "networks/lora.py"), ("--network_module", "networks/lora.py")),
        (("--network_module", "json"), ("--network_module json", "create_network")),
        (("--network_args", "conv_dim"), ("--network_args", "'conv_dim'", "key=value")),
        (("--network_weights", "gone.safetensors"), ("--network_weights gone.safetensors", "no such file")),
        (("--base_weights", "gone.safetensors"), ("--base_weights gone.safetensors", "no such file")),
        (("--vae", "gone.safetensors"), ("--vae", "gone.safetensors")),
        (("--resume", "gone"), ("--resume gone", "no such state folder")),
        (("--sample_prompts", "gone.txt", "--sample_at_first"), ("--sample_prompts gone.txt", "no such file")),
    ],
    ids=lambda value: "-".join(value).replace("--", "")[:40],
)
def test_options(bench: Bench, options: tuple[str, ...], words: tuple[str, ...]):
    refused(bench, options, *words)


def test_no_image_is_looked_for_before_all_names_are_found(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    """Measuring a million images takes long."""
    monkeypatch.setattr(session, "load_datasets", lambda settings: pytest.fail("the images came first"))
    refused(bench, ("--network_module", "networks.nosuch"), "networks.nosuch")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--network_args", "conv_dimm=4"), ("--network_args conv_dimm", "did you mean conv_dim?")),
        (("--network_args", "conv_dim=four"), ("--network_args conv_dim=four", "whole number")),
        (("--learning_rate", "0"), ("nothing to train", "learning rate is 0")),
    ],
)
def test_what_only_the_model_shows_comes_before_the_latents(bench: Bench, options: tuple[str, ...], words):
    refused(bench, (*options, "--cache_latents"), *words, late=True)


def test_an_unfit_network_file(bench: Bench):
    refused(bench, ("--network_weights", bench.file("a.safetensors", b"hello")), "--network_weights", "a.safetensors")
    refused(bench, ("--network_weights", bench.model), bench.model.name, "no key of a LoRA file", late=True)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.txt", "a cat --n bad\na dog --w abc\n", ("p.txt line 2", "--w abc", "whole number")),
        ("p.txt", "a cat --ss nosuch\n", ("p.txt line 1", "--ss nosuch", "choose one of ddim")),
        ("p.txt", "a cat --s 1\n", ("p.txt", "sampler ddim", "at least 2 steps")),
        ("p.txt", "a cat --s 2 --ss k_dpm_2_a\n", ("p.txt", "k_dpm_2_a", "at least 3 steps")),
        ("p.txt", b"\xff\xfe\x00", ("p.txt", "UTF-8")),
        ("p.txt", "\n", ("p.txt", "no prompt")),
        ("p.json", "{bad", ("p.json", "no valid JSON", "line 1")),
        ("p.xyz", "a cat", ("p.xyz", ".txt, .toml or .json")),
    ],
)
def test_prompt_files(bench: Bench, name: str, text: bytes | str, words: tuple[str, ...]):
    refused(bench, ("--sample_at_first", "--sample_prompts", bench.file(name, text)), *words)


@pytest.mark.parametrize("more", [(), ("--dry_run",)])
def test_an_empty_prompt_file_draws_nothing(bench: Bench, more: tuple[str, ...]):
    """The reference's front end writes one into each configuration, unless prompts were entered."""
    assert bench.run("--sample_prompts", bench.file("p.txt", ""), *more) == 0
    said = bench.capsys.readouterr()
    assert said.err.count("there is no prompt in it, so there are no previews") == 1
    assert not more or "no previews" in said.out
    assert not list(bench.out.glob("*previews.png"))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("batch_sizee = 2\nSUBSET", ("d.toml line 2", "datasets[0].batch_sizee", "did you mean batch_size?")),
        ("batch_size = 0\nSUBSET", ("d.toml line 2", "datasets[0].batch_size is 0", "1 or more")),
        ("SUBSETnum_repeats = 'x'\n", ("d.toml line 4", "datasets[0].subsets[0].num_repeats is 'x'", "whole number")),
        ("SUBSETflip_aug = 1\n", ("d.toml line 4", "datasets[0].subsets[0].flip_aug is 1")),
        ("SUBSETmetadata_file = 'x.json'\nclass_tokens = 'c'\n", ("d.toml line 5", "class_tokens has no meaning")),
        ("", ("d.toml line 1", "datasets[0].subsets", "must be a list")),
        ("x = = 1", ("--dataset_config", "d.toml", "line 2")),
    ],
)
def test_data_set_files(bench: Bench, body: str, words: tuple[str, ...]):
    subset = f'[[datasets.subsets]]\nimage_dir = "{bench.photos}/1_sks thing"\n'
    path = bench.file("d.toml", "[[datasets]]\n" + body.replace("SUBSET", subset))
    refused(bench, ("--dataset_config", path), *words)


@pytest.mark.parametrize("more", [(), ("--dry_run",)])
def test_a_warm_up_that_never_ends_is_told_once(bench: Bench, more: tuple[str, ...]):
    assert bench.run("--lr_scheduler", "linear", "--lr_warmup_steps", "5", *more) == 0
    assert bench.capsys.readouterr().err.count("--lr_warmup_steps 5 is longer than the run of 1 steps") == 1
