"""sdxl_train_control_net_lllite.py: what it learns, what it writes, arrangements that must not change the result."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.families.sdxl import SdxlFamily
from library.generation.app import run as draw
from library.models.save import save_single_file
from library.options import ModelOptions
from library.options.scripts import GEN_IMG
from library.training import loop
from networks.lllite import ControlNetLLLite, LLLiteSize, load_lllite
from tests.toy import toy_modules, toy_spec
from tests.training.runs import (
    LLLITE_SCRIPT,
    SDXL_SCRIPT,
    command,
    launch_two,
    metadata,
    state,
    stop_after,
    tensors,
    train,
    write_pairs,
)

SIZES = [(130, 70), (70, 130), (64, 64), (200, 190)]
BUCKETS = ("--enable_bucket", "--min_bucket_reso", "32", "--max_bucket_reso", "96")
SMALL = ("--cond_emb_dim", "8", "--network_dim", "6")
TWO_STEPS = ("--max_train_steps", "2")
LAYERS = 32
SGD = ("--optimizer_type", "SGD", "--learning_rate", "1", "--max_grad_norm", "0")  # moves well above rounding
UNMOVED = "attn1_to_k.up.0.bias"  # attention does not change if all keys are shifted alike


@dataclass(frozen=True)
class Pairs:
    """Images and the pictures that belong to them."""

    images: Path
    edges: Path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Four square pairs."""
    return Pairs(*write_pairs(tmp_path_factory.mktemp("pairs"), [(64, 64)] * 4))


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Pairs of which each has sizes, crop and bucket of its own."""
    return Pairs(*write_pairs(tmp_path_factory.mktemp("varied"), SIZES))


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A net that does something already, so that all of its tensors learn from the first step on."""
    net = ControlNetLLLite(toy_modules("sdxl")["unet"], LLLiteSize(8, 6))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    path = tmp_path_factory.mktemp("begun") / "net.safetensors"
    net.save_weights(path)
    return path


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The loss of each optimizer step of the runs of a test."""
    found: list[float] = []
    original = loop.train_step

    def train_step(*arguments: Any) -> Any:
        report = original(*arguments)
        found.append(report.loss)
        return report

    monkeypatch.setattr(loop, "train_step", train_step)
    return found


def run(model: Path, data: Pairs, out: Path, *options: str) -> Path:
    """The file that a run with these options writes."""
    words = ("--conditioning_data_dir", str(data.edges), *options)
    assert train(model, data.images, out, *words, script=LLLITE_SCRIPT) == 0
    return out / "toy.safetensors"


def refusal(model: Path, data: Pairs, out: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What a run that cannot be says."""
    capsys.readouterr()
    assert train(model, data.images, out, *options, script=LLLITE_SCRIPT) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def apart(one: Path, other: Path, start: Path) -> float:
    """Largest difference of two files' tensors, relative to how far that tensor moved from where it began."""
    a, b, begin = tensors(one), tensors(other), tensors(start)
    assert a.keys() == b.keys() == begin.keys()
    return max(relative(a[key], b[key], begin[key]) for key in a if not key.endswith(UNMOVED))


def relative(a: Tensor, b: Tensor, begin: Tensor) -> float:
    moved = float((a - begin).abs().max())
    assert moved > 1e-5
    return float((a - b).abs().max()) / moved


def same(one: Path, other: Path) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- what it learns


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--mixed_precision", "bf16"),
        ("--mixed_precision", "bf16", "--full_bf16", "--gradient_checkpointing"),
        ("--mixed_precision", "bf16", "--fp8_base"),
        ("--optimizer_type", "AdaFactor", "--network_dropout", "0.2"),
        ("--v_parameterization", "--min_snr_gamma", "5", "--noise_offset", "0.05"),
    ],
    ids=["plain", "bf16", "full bf16", "fp8", "adafactor", "v"],
)
def test_three_steps(options, model_sdxl, pairs, tmp_path, losses):
    file = run(model_sdxl, pairs, tmp_path, *SMALL, "--max_train_steps", "3", *options)
    assert len(losses) == 3
    assert all(np.isfinite(losses))
    found = tensors(file)
    assert len({key.partition(".")[0] for key in found}) == LAYERS
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())
    assert all(bool(tensor.any()) for key, tensor in found.items() if ".up.0.weight" in key)


def test_a_fresh_net_leaves_the_model_as_it_is(model_sdxl, pairs, tmp_path, losses):
    """The first loss is that of the model without net, whatever the pictures; later ones depend on them."""
    run(model_sdxl, pairs, tmp_path / "a", *SMALL, *TWO_STEPS, "--learning_rate", "0.1")
    blank = tmp_path / "blank"
    blank.mkdir()
    for path in pairs.edges.iterdir():
        Image.new("RGB", (64, 64), "white").save(blank / path.name)
    run(model_sdxl, Pairs(pairs.images, blank), tmp_path / "b", *SMALL, *TWO_STEPS, "--learning_rate", "0.1")
    assert losses[0] == losses[2]
    assert losses[1] != losses[3]


def test_it_learns_to_follow_its_pictures(tmp_path, losses):
    """At nearly pure noise the target (velocity) is the image, which only the conditioning picture tells."""
    modules = toy_modules("sdxl")
    with torch.no_grad():
        modules["vae"].quant_conv.weight[:4] *= 15  # latents of the size that trained VAEs have
    model = tmp_path / "model.safetensors"
    save_single_file(model, toy_spec("sdxl"), modules, torch.float32, None)
    images, edges, wrong = (tmp_path / name for name in ("images", "edges", "wrong"))
    rows, columns = np.mgrid[0:64, 0:64]
    for name, place in {"lying": rows, "standing": columns}.items():
        picture = Image.fromarray(((place // 8) % 2 * 255).astype(np.uint8)).convert("RGB")
        for folder in (images, edges):
            folder.mkdir(exist_ok=True)
            picture.save(folder / f"{name}.png")
        (images / f"{name}.txt").write_text("stripes")
    shutil.copytree(edges, wrong)
    (wrong / "lying.png").write_bytes((edges / "standing.png").read_bytes())
    (wrong / "standing.png").write_bytes((edges / "lying.png").read_bytes())
    shared = ("--train_batch_size", "2", "--cache_latents", "--v_parameterization", "--min_timestep", "980")
    learning = ("--max_train_steps", "60", "--learning_rate", "1e-2", "--cond_emb_dim", "16", "--network_dim", "16")
    file = run(model, Pairs(images, edges), tmp_path / "out", *shared, *learning)
    looking = ("--max_train_steps", "10", "--learning_rate", "1e-20", "--network_weights", str(file), "--seed", "11")
    found: dict[str, float] = {}
    for folder in (edges, wrong):
        losses.clear()
        run(model, Pairs(images, folder), tmp_path / f"of {folder.name}", *shared, *looking, "--optimizer_type", "SGD")
        found[folder.name] = mean(losses)
    assert found["edges"] < 0.85 * found["wrong"], found


def test_dropout_acts_and_is_repeatable(model_sdxl, pairs, begun, tmp_path):
    """With and without gradient checkpointing: the reference had it only with it."""
    shared = ("--network_weights", str(begun), *TWO_STEPS, *SGD)
    without = run(model_sdxl, pairs, tmp_path / "without", *shared)
    dropout = [
        run(model_sdxl, pairs, tmp_path / name, *shared, "--network_dropout", "0.5", *more)
        for name, more in {"a": (), "b": (), "c": ("--gradient_checkpointing",)}.items()
    ]
    assert same(dropout[0], dropout[1])
    assert apart(dropout[0], dropout[2], begun) < 1e-4
    assert apart(dropout[0], without, begun) > 0.1


# ---- arrangements


def test_accumulation_equals_the_big_batch(model_sdxl, pairs, begun, tmp_path):
    shared = ("--network_weights", str(begun), *TWO_STEPS, *SGD)
    big = run(model_sdxl, pairs, tmp_path / "big", "--train_batch_size", "4", *shared)
    small = run(model_sdxl, pairs, tmp_path / "small", "--gradient_accumulation_steps", "4", *shared)
    assert apart(big, small, begun) < 1e-3


def test_workers_checkpointing_and_caches_change_nothing(model_sdxl, varied, begun, tmp_path):
    augmented = ("--flip_aug", "--train_batch_size", "2", *BUCKETS)
    shared = ("--network_weights", str(begun), *augmented, *TWO_STEPS, *SGD)
    plain = run(model_sdxl, varied, tmp_path / "plain", *shared)
    for name, options in {
        "workers": ("--max_data_loader_n_workers", "4"),
        "memory": ("--gradient_checkpointing",),
        "text": ("--cache_text_encoder_outputs",),
    }.items():
        assert apart(plain, run(model_sdxl, varied, tmp_path / name, *shared, *options), begun) < 1e-3, name


def test_cached_latents_equal_uncached_ones(varied, begun, tmp_path):
    """With a VAE whose posterior has no width the draws do not matter; mirrored and cropped pairs must agree too."""
    modules = toy_modules("sdxl")
    with torch.no_grad():
        modules["vae"].quant_conv.weight[4:] = 0
        modules["vae"].quant_conv.bias[4:] = -40
    narrow = tmp_path / "narrow.safetensors"
    save_single_file(narrow, toy_spec("sdxl"), modules, torch.float32, {})
    shared = ("--network_weights", str(begun), "--flip_aug", *BUCKETS, *TWO_STEPS, *SGD)
    pixels = run(narrow, varied, tmp_path / "pixels", *shared)
    for name, options in {
        "memory": ("--cache_latents",),
        "disk": ("--cache_latents_to_disk", "--max_data_loader_n_workers", "4"),
    }.items():
        assert apart(pixels, run(narrow, varied, tmp_path / name, *shared, *options), begun) < 2e-3, name


def test_two_interruptions_change_no_byte(model_sdxl, varied, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    options = (
        "--max_train_steps", "5", "--train_batch_size", "2", "--gradient_accumulation_steps", "2", *BUCKETS, *SMALL,
        "--flip_aug", "--shuffle_caption", "--caption_dropout_rate", "0.2", "--network_dropout", "0.1",
        "--lr_scheduler", "cosine", "--lr_warmup_steps", "2",
    )  # fmt: skip
    whole, broken = run(model_sdxl, varied, tmp_path / "whole", *options), tmp_path / "broken"
    resume: tuple[str, ...] = ()
    for steps in (2, 4):
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            run(model_sdxl, varied, broken, *options, *resume)
        folder = broken / f"toy-step{steps:08d}-state"
        assert state(folder)["step"] == steps
        resume = ("--resume", str(folder))
    assert run(model_sdxl, varied, broken, *options, *resume).read_bytes() == whole.read_bytes()


def test_two_processes_equal_one_with_twice_the_batch(model_sdxl, pairs, begun, tmp_path):
    shared = ("--conditioning_data_dir", str(pairs.edges), "--network_weights", str(begun), *TWO_STEPS, *SGD)
    shared += ("--cache_latents_to_disk", "--gradient_checkpointing")
    arguments = command(
        model_sdxl, pairs.images, tmp_path / "two", "--train_batch_size", "1", *shared, script=LLLITE_SCRIPT
    )
    done = launch_two("sdxl_train_control_net_lllite.py", arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes" in done.stderr
    one = run(model_sdxl, pairs, tmp_path / "one", "--train_batch_size", "2", *shared)
    assert apart(one, tmp_path / "two" / "toy.safetensors", begun) < 1e-3


# ---- files


def test_the_file_loads_and_draws(model_sdxl, pairs, tmp_path):
    file = run(model_sdxl, pairs, tmp_path, *SMALL, "--max_train_steps", "6", "--learning_rate", "3e-2")
    facts = metadata(file)
    assert facts["modelspec.architecture"] == "stable-diffusion-xl-v1-base/control-net-lllite"
    assert (facts["ss_cond_emb_dim"], facts["ss_network_dim"], facts["modelspec.title"]) == ("8", "6", "toy")
    parts = SdxlFamily().load(ModelOptions(pretrained_model_name_or_path=str(model_sdxl)))
    assert load_lllite(file, parts.unet).size == LLLiteSize(8, 6)

    def pixels(name: str, *options: str) -> np.ndarray:
        words = ["--ckpt", str(model_sdxl), "--steps", "2", "--W", "64", "--H", "64", "--prompt", "x", "--seed", "1"]
        assert draw(GEN_IMG, [*words, "--outdir", str(tmp_path / name), *options]) == 0
        with Image.open(next((tmp_path / name).glob("*.png"))) as picture:
            return np.asarray(picture).astype(int)

    guides = sorted(pairs.edges.iterdir())
    drawn = [
        pixels(guide.stem, "--control_net_lllite_models", str(file), "--guide_image_path", str(guide))
        for guide in guides[:2]
    ]
    assert abs(drawn[0] - pixels("plain")).max() > 3
    assert abs(drawn[0] - drawn[1]).max() > 0


@pytest.mark.parametrize("suffix", ["ckpt", "pt"])
def test_pickled_files_hold_the_same_and_are_read_again(suffix, model_sdxl, pairs, begun, tmp_path):
    shared = ("--network_weights", str(begun), *TWO_STEPS, "--save_precision", "fp16")
    whole = tensors(run(model_sdxl, pairs, tmp_path, *shared))
    run(model_sdxl, pairs, tmp_path, *shared, "--save_model_as", suffix)
    pickled = torch.load(tmp_path / f"toy.{suffix}", weights_only=True)
    assert pickled.keys() == whole.keys()
    assert all(torch.equal(pickled[key], whole[key]) for key in whole)
    assert next(iter(whole.values())).dtype == torch.float16
    run(model_sdxl, pairs, tmp_path / "again", "--network_weights", str(tmp_path / f"toy.{suffix}"), *TWO_STEPS)


def test_widths_are_those_of_the_file_to_start_from(model_sdxl, pairs, begun, tmp_path, capsys):
    still = ("--network_weights", str(begun), "--max_train_steps", "1", "--optimizer_type", "SGD")
    file = run(model_sdxl, pairs, tmp_path, *still, "--learning_rate", "1e-20")
    assert same(file, begun)
    assert metadata(file)["ss_cond_emb_dim"] == "8"
    folder = ("--conditioning_data_dir", str(pairs.edges))
    said = refusal(model_sdxl, pairs, tmp_path, capsys, *folder, *still, "--network_dim", "7")
    assert "has cond_emb_dim 8 and network_dim 6; leave these two options out" in said


def test_usual_widths(model_sdxl, pairs, tmp_path):
    file = run(model_sdxl, pairs, tmp_path, "--max_train_steps", "1")
    facts = metadata(file)
    assert (facts["ss_cond_emb_dim"], facts["ss_network_dim"]) == ("32", "64")


def test_the_plan_of_a_run(model_sdxl, pairs, tmp_path, capsys):
    words = ("--conditioning_data_dir", str(pairs.edges), "--dry_run")
    assert train(model_sdxl, pairs.images, tmp_path, *words, script=LLLITE_SCRIPT) == 0
    said = capsys.readouterr().out
    assert f"after pictures of {pairs.edges}" in said
    assert "control" in said


# ---- previews


def previews(out: Path) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    for path in sorted((out / "sample").glob("*.png")):
        with Image.open(path) as picture:
            found.append(np.asarray(picture).astype(int))
    return found


def test_previews_follow_their_pictures_and_change_nothing(model_sdxl, pairs, begun, tmp_path):
    one, two = sorted(pairs.edges.iterdir())[:2]
    lines = [f"a thing --d 1 --s 2 --w 64 --h 64{guide}" for guide in ("", f" --cn {one}", f" --cn {two}", "")]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(lines))
    shared = ("--network_weights", str(begun), *TWO_STEPS)
    plain = run(model_sdxl, pairs, tmp_path / "plain", *shared)
    drawing = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "1", "--sample_at_first")
    with_previews = run(model_sdxl, pairs, tmp_path / "out", *shared, *drawing)
    assert same(plain, with_previews)
    first, *_ = drawn = previews(tmp_path / "out")
    assert len(drawn) == 12
    without, after_one, after_two, without_again = drawn[-4:]
    assert np.array_equal(first, without)  # what has no picture is the model's own, however far the net has come
    assert np.array_equal(without, without_again)
    assert abs(after_one - without).max() > 5
    assert abs(after_one - after_two).max() > 1


def test_previews_in_half_precision(model_sdxl, pairs, begun, tmp_path):
    prompts = tmp_path / "prompts.txt"
    guide = next(pairs.edges.iterdir())
    prompts.write_text(f"a thing --d 1 --s 2 --w 64 --h 64 --cn {guide}\na thing --d 1 --s 2 --w 64 --h 64\n")
    shared = ("--network_weights", str(begun), "--max_train_steps", "1", "--mixed_precision", "bf16")
    drawing = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "1", "--cache_text_encoder_outputs")
    for name, more in {"mixed": (), "full": ("--full_bf16",)}.items():
        run(model_sdxl, pairs, tmp_path / name, *shared, *drawing, *more)
        guided, plain = previews(tmp_path / name)
        assert abs(guided - plain).max() > 5


def test_what_previews_cannot_show_is_said(model_sdxl, photos, pairs, tmp_path, caplog):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"a --s 2 --w 64 --h 64 --cn {next(pairs.edges.iterdir())}\nb --s 2 --w 64 --h 64\n")
    drawing = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "2", *TWO_STEPS)
    run(model_sdxl, pairs, tmp_path / "net", *SMALL, *drawing)
    assert "1 prompts have no picture (--cn) and are drawn without the net" in caplog.text
    caplog.clear()
    assert train(model_sdxl, photos, tmp_path / "lora", *drawing, script=SDXL_SCRIPT) == 0
    assert "--cn has no effect: no ControlNet is trained here" in caplog.text
    assert len(previews(tmp_path / "lora")) == 2


def test_a_preview_s_picture_must_be_there(model_sdxl, pairs, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a thing --cn nowhere.png\n")
    words = ("--conditioning_data_dir", str(pairs.edges), "--sample_prompts", str(prompts))
    said = refusal(model_sdxl, pairs, tmp_path, capsys, *words, "--sample_every_n_steps", "1")
    assert "--cn nowhere.png: there is no such file" in said


# ---- bad input


def test_what_the_command_line_lacks(model_sdxl, pairs, tmp_path, capsys):
    assert "--conditioning_data_dir is missing" in refusal(model_sdxl, pairs, tmp_path, capsys)
    words = ("--conditioning_data_dir", str(pairs.edges), "--in_json", "m.json", "--reg_data_dir", "r")
    said = refusal(model_sdxl, pairs, tmp_path, capsys, *words)
    assert "--in_json has no conditioning pictures" in said
    assert "--reg_data_dir has no conditioning pictures" in said


def test_missing_pairs_are_named_before_any_slow_work(pairs, tmp_path, capsys):
    edges = tmp_path / "edges"
    shutil.copytree(pairs.edges, edges)
    (edges / "photo1.png").unlink()
    (edges / "photo3.png").write_bytes(b"")
    words = ("--conditioning_data_dir", str(edges))
    said = refusal(tmp_path / "no model is read.safetensors", pairs, tmp_path, capsys, *words)
    assert "photo1.png: has no conditioning picture" in said
    assert "photo3.png: its conditioning picture" in said
    assert "no model" not in said


def test_other_models_and_other_files(model, model_sdxl, pairs, tmp_path, capsys):
    folder = ("--conditioning_data_dir", str(pairs.edges))
    assert "this script is for SDXL" in refusal(model, pairs, tmp_path, capsys, *folder)
    said = refusal(model_sdxl, pairs, tmp_path, capsys, *folder, "--network_weights", str(model))
    assert "holds no ControlNet-LLLite weights" in said
    said = refusal(model_sdxl, pairs, tmp_path, capsys, *folder, "--learning_rate", "0")
    assert "nothing to train" in said


OWN_DATA = """
import torch
from library.data.records import Batch

class Data:
    guides = torch.zeros(1, 3, 64, 64)

    def __init__(self, **_):
        pass

    def __len__(self):
        return 1

    def load(self, index, clock):
        sizes = torch.full((1, 2), 64)
        return Batch(
            ("a",), (1,), ("x",), torch.ones(1), sizes, torch.zeros(1, 2), sizes, (False,),
            latents_BCHW=torch.zeros(1, 4, 8, 8), conditioning_images_BCHW=self.guides,
        )

class Pictureless(Data):
    guides = None
"""


def test_data_set_classes_of_the_user(model_sdxl, pairs, tmp_path, capsys, monkeypatch, losses):
    (tmp_path / "own_pairs.py").write_text(OWN_DATA)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = ("--dataset_class", "own_pairs.Data", *SMALL, *TWO_STEPS)
    assert train(model_sdxl, pairs.images, tmp_path, *own, script=LLLITE_SCRIPT) == 0
    assert len(losses) == 2
    said = refusal(model_sdxl, pairs, tmp_path, capsys, "--dataset_class", "own_pairs.Pictureless")
    assert "must have conditioning_images_BCHW" in said
