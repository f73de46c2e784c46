"""Whole runs of gen_img.py on the toy model, as a user's command line would."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from diffusers import AutoencoderKL
from PIL import Image

from library.generation.app import run
from library.generation.denoise import Denoising
from library.generation.jobs import DeepShrink, GradualLatent, defaults_of, settle
from library.generation.lines import parse_line
from library.generation.model import load_model
from library.generation.watch import Window
from library.options.script import parse
from library.options.scripts import GEN_IMG, SDXL_GEN_IMG
from tests.toy import write_toy_checkpoint, write_toy_folder

SHORT = ("--steps", "3", "--sampler", "euler_a", "--W", "64", "--H", "64")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy") / "toy.safetensors", "sd1")


@pytest.fixture(scope="module")
def model_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy") / "xl.safetensors", "sdxl")


def draw(model: Path, out: Path, *more: str, status: int = 0) -> list[Path]:
    """The pictures that a run leaves, in the order of their names."""
    assert run(GEN_IMG, ["--ckpt", str(model), "--outdir", str(out), *SHORT, *more]) == status
    return sorted(out.glob("*.png"))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def entries(path: Path) -> dict[str, str]:
    with Image.open(path) as picture:
        return dict(picture.info)


def lines(folder: Path, *prompts: str) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\n".join(prompts), encoding="utf-8")
    return path


def test_one_prompt(model: Path, tmp_path: Path) -> None:
    (picture,) = draw(model, tmp_path, "--prompt", "a (red:1.2) cat --n blurry --l 5 --nl 2", "--seed", "42")
    told = entries(picture)
    wanted = {"prompt": "a (red:1.2) cat", "seed": "42", "sampler": "euler_a", "steps": "3", "scale": "5.0"}
    wanted |= {"negative-prompt": "blurry", "negative-scale": "2.0"}
    wanted["raw-prompt"] = "a (red:1.2) cat --n blurry --l 5 --nl 2"
    assert {key: told[key] for key in wanted} == wanted
    assert list(told)[:6] == ["prompt", "seed", "sampler", "steps", "scale", "negative-prompt"]
    assert picture.name.endswith("_000_42.png")
    assert str(tmp_path) not in told["sd-trainer"]  # no folders of this machine
    assert pixels(picture).shape == (64, 64, 3)
    assert pixels(picture).std() > 1


def test_a_picture_depends_on_its_own_seed_only(model: Path, tmp_path: Path) -> None:
    alone = draw(model, tmp_path / "a", "--prompt", "a dog --d 7")
    file = lines(tmp_path, "a cat --d 1", "a dog --d 7", "a bird, sitting on a branch --d 9")
    batch = draw(model, tmp_path / "b", "--from_file", str(file), "--batch_size", "3", "--sequential_file_name")
    after = draw(model, tmp_path / "c", "--from_file", str(file), "--sequential_file_name")
    assert np.array_equal(pixels(alone[0]), pixels(after[1]))
    assert abs(pixels(alone[0]) - pixels(batch[1])).max() <= 1  # products of other shapes round differently
    assert abs(pixels(batch[0]) - pixels(batch[1])).max() > 5


@pytest.mark.parametrize("count", [1, 2])
def test_a_picture_is_repeated_bit_for_bit(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    more = (
        "--prompt",
        "a {red|blue} (cat:1.3) --n dull",
        "--images_per_prompt",
        str(count),
        "--batch_size",
        str(count),
    )
    first = draw(model, tmp_path / "a", *more, "--emb_normalize_mode", "abs", "--clip_skip", "2", "--scale", "4")
    loaded: list[object] = []
    monkeypatch.setattr(
        "library.generation.repeat.load_model", lambda *given: loaded.append(given) or load_model(*given)
    )
    again = draw(model, tmp_path / "b", "--from_image", *map(str, first))
    assert len(loaded) == 1
    assert [pixels(path).tolist() for path in again] == [pixels(path).tolist() for path in first]
    assert entries(again[0])["seed"] == entries(first[0])["seed"]


def test_foreign_pictures_cannot_be_repeated(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    draw(model, tmp_path / "out", "--from_image", str(tmp_path / "x.png"), status=1)
    assert "only own pictures can be repeated" in capsys.readouterr().err


def test_bad_lines_are_told_and_left_out(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = lines(
        tmp_path, "# comment", "  # comment too", "good --d 1", "bad --t 1.5", "{3$$a|b}", "odd --quality x --d 2"
    )
    made = draw(model, tmp_path / "out", "--from_file", str(file), status=1)
    assert [path.name.split("_")[-1] for path in made] == ["1.png", "2.png"]
    for place in ("line 4", "line 5", "line 6: there is no in-line option --quality"):
        assert place in caplog.text


def test_an_empty_prompt_is_drawn(model: Path, tmp_path: Path) -> None:
    (empty,) = draw(model, tmp_path / "a", "--prompt", "", "--seed", "1")
    (other,) = draw(model, tmp_path / "b", "--prompt", "a cat", "--seed", "1")
    assert not np.array_equal(pixels(empty), pixels(other))
    (again,) = draw(model, tmp_path / "c", "--from_image", str(empty))
    assert np.array_equal(pixels(again), pixels(empty))


TOO_FEW = [
    ("--prompt", "x", "--steps", "1"),
    ("--prompt", "x --s 1"),
    ("--prompt", "x --ss dpm_2_a", "--steps", "2"),
    ("--prompt", "x", "--highres_fix_scale", "0.5", "--highres_fix_steps", "1"),
    ("--interactive", "--steps", "1"),
    ("--from_module", "any.py", "--steps", "1"),
]


@pytest.mark.parametrize("more", TOO_FEW, ids=" ".join)
def test_too_few_steps_are_told_before_the_model_is_loaded(
    more: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(GEN_IMG, ["--ckpt", "nowhere.safetensors", "--outdir", str(tmp_path), *more]) == 1
    said = capsys.readouterr().err
    assert "needs at least" in said
    assert "nowhere" not in said


def test_a_line_that_asks_for_enough_steps_is_drawn(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = lines(tmp_path, "x --s 1 --d 1", "x --s 2 --d 2")
    made = draw(model, tmp_path / "out", "--from_file", str(file), "--steps", "1", status=1)
    assert [path.name.split("_")[-1] for path in made] == ["2.png"]
    assert "line 1: sampler euler_a: needs at least 2 steps, not 1" in caplog.text


def test_names_are_never_taken_twice(model: Path, tmp_path: Path) -> None:
    more = ("--prompt", "x", "--images_per_prompt", "2", "--sequential_file_name")
    draw(model, tmp_path, *more)
    first = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert set(first) == {"im_000001.png", "im_000002.png"}
    made = draw(model, tmp_path, *more, "--n_iter", "2")
    assert len(made) == 6
    assert all((tmp_path / name).read_bytes() == content for name, content in first.items())


def test_seeds_and_iterations(model: Path, tmp_path: Path) -> None:
    seeds = lambda made: [entries(path)["seed"] for path in made]  # noqa: E731
    more = ("--seed", "42", "--sequential_file_name")
    file = lines(tmp_path, "a", "b --d 5", "c")
    row = seeds(draw(model, tmp_path / "a", "--from_file", str(file), *more))
    assert row == ["2746317213", "5", "1181241943"]
    same = seeds(draw(model, tmp_path / "b", "--from_file", str(file), *more, "--iter_same_seed", "--n_iter", "2"))
    assert same == ["2746317213", "5", "2746317213", "1181241943", "5", "1181241943"]


def test_shuffled_lines_are_the_same_lines(model: Path, tmp_path: Path) -> None:
    file = lines(tmp_path, *(f"word{number} --d {number}" for number in range(5)))
    more = ("--from_file", str(file), "--shuffle_prompts", "--seed", "3", "--sequential_file_name", "--steps", "2")
    orders = [[entries(path)["prompt"] for path in draw(model, tmp_path / name, *more)] for name in "ab"]
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == [f"word{number}" for number in range(5)]
    assert orders[0] != sorted(orders[0])


def test_keyboard(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter(["a cat --d 1", "  ", "bad --t 7", "a dog --d 2"])

    def read(_: str = "") -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    made = draw(model, tmp_path, "--interactive", "--no_preview", "--batch_size", "4", status=1)
    assert [entries(path)["prompt"] for path in made] == ["a cat", "a dog"]


def test_prompt_module(model: Path, tmp_path: Path) -> None:
    module = tmp_path / "words.py"
    module.write_text(
        "def get_prompter(args, pipe, networks):\n"
        "    count = int(args.prompter_module_args)\n"
        "    def prompter(args, pipe, seed_random, iter_seed, prompt_index, global_step):\n"
        "        return None if prompt_index == count else f'word{prompt_index} --d {global_step}'\n"
        "    return prompter\n"
    )
    more = ("--from_module", str(module), "--prompter_module_args", "2", "--images_per_prompt", "2")
    made = draw(model, tmp_path / "out", *more, "--sequential_file_name")
    assert [(entries(path)["prompt"], entries(path)["seed"]) for path in made] == [
        ("word0", "0"), ("word0", "0"), ("word1", "2"), ("word1", "2")
    ]  # fmt: skip


def test_ctrl_c_finishes_the_picture(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Denoising.run

    def interrupted(self: Denoising, latents: object) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, latents)  # type: ignore[arg-type]

    monkeypatch.setattr(Denoising, "run", interrupted)
    made = draw(model, tmp_path, "--prompt", "x", "--images_per_prompt", "5")
    assert len(made) == 1
    assert pixels(made[0]).shape == (64, 64, 3)


def test_grid_and_preview(model: Path, tmp_path: Path) -> None:
    file = lines(tmp_path, "a very long prompt that has to be broken in several lines to fit --d 1,2", "b --d 1,2")
    more = ("--images_per_prompt", "2", "--grid", "--preview_every_n_steps", "1")
    draw(model, tmp_path / "out", "--from_file", str(file), *more)
    (sheet,) = (tmp_path / "out").glob("grid_*.png")
    assert pixels(sheet).shape[1] > 2 * 64
    assert (tmp_path / "out" / "preview.png").is_file()
    with Image.open(sheet) as picture:
        cells = [picture.getpixel((x, y)) for x in (200, 272) for y in (60, 132)]
    assert all(cell != (255, 255, 255) for cell in cells)


def test_a_window_may_fail_without_a_word(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr("cv2.imshow", fail)
    Window().show(Image.new("RGB", (8, 8)), "x")
    assert "no preview window here (RuntimeError)" in caplog.text


def test_long_prompts_use_the_rows_that_they_need(model: Path, tmp_path: Path) -> None:
    long = ", ".join(["word"] * 60)
    one, more = ("--max_embeddings_multiples", "1"), ("--max_embeddings_multiples", "3")
    cut = draw(model, tmp_path / "a", "--prompt", f"{long} and the end --d 1", *one)
    whole = draw(model, tmp_path / "b", "--prompt", f"{long} and the end --d 1", *more)
    assert abs(pixels(cut[0]) - pixels(whole[0])).max() > 0
    short = [draw(model, tmp_path / name, "--prompt", "short --d 1", *rows) for name, rows in (("c", one), ("d", more))]
    assert np.array_equal(pixels(short[0][0]), pixels(short[1][0]))


def test_sdxl_and_its_sizes(model_sdxl: Path, tmp_path: Path) -> None:
    plain = draw(model_sdxl, tmp_path / "a", "--prompt", "a cat --d 1")
    sized = draw(model_sdxl, tmp_path / "b", "--prompt", "a cat --d 1 --ow 16 --oh 16 --nw 8 --nh 8 --ct 4 --cl 4")
    named = tmp_path / "c"
    words = ["--ckpt", str(model_sdxl), "--outdir", str(named), *SHORT, "--prompt", "a cat --d 1"]
    assert run(SDXL_GEN_IMG, words) == 0
    assert np.array_equal(pixels(plain[0]), pixels(next(named.glob("*.png"))))
    assert abs(pixels(plain[0]) - pixels(sized[0])).max() > 0
    assert entries(sized[0])["crop-top"] == "4"
    assert entries(plain[0])["original-height"] == "None"
    recipe = json.loads(entries(sized[0])["sd-trainer"])
    assert recipe["job"]["shared"]["sizes"]["original_width"] == 16
    again = draw(model_sdxl, tmp_path / "d", "--from_image", str(sized[0]))
    assert np.array_equal(pixels(again[0]), pixels(sized[0]))


def test_folders_and_patterns(model: Path, tmp_path: Path) -> None:
    folder = write_toy_folder(tmp_path / "model", "sd1")
    file = draw(model, tmp_path / "a", "--prompt", "x --d 1")
    for name, ckpt in (("b", folder), ("c", model.with_name("to*.safetensors"))):
        assert np.array_equal(pixels(draw(ckpt, tmp_path / name, "--prompt", "x --d 1")[0]), pixels(file[0]))


def test_the_plan_needs_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = lines(tmp_path, "{e$$a|b} cat --n dull", "dog --x 3")
    words = ["--ckpt", "nowhere", "--from_file", str(file), "--images_per_prompt", "2", "--dry_run"]
    assert run(GEN_IMG, words) == 0
    said = capsys.readouterr().out
    assert "1 x a cat --n dull\n1 x b cat --n dull\n2 x dog --x 3\n" in said
    assert "4 pictures" in said


def test_parts_that_wait_off_the_device_draw_the_same(model: Path, tmp_path: Path) -> None:
    plain = draw(model, tmp_path / "a", "--prompt", "x --d 1")
    assert np.array_equal(pixels(draw(model, tmp_path / "b", "--prompt", "x --d 1", "--lowram")[0]), pixels(plain[0]))


REFUSED = [
    (("--prompt", "x", "--ckpt", "nowhere.safetensors"), "there is no such file"),
    (("--prompt", "x", "--ckpt", "./nowhere"), "there is no such file"),
    (("--prompt", "x", "--ckpt", "nowhere.safetensors", "--network_weights", "gone.pt"), "gone.pt: there is no such"),
    (("--prompt", "x", "--sdxl"), "is another kind of model"),
    (("--prompt", "x", "--v1", "--v2"), "exclude each other"),
    (("--prompt", "x", "--fp16"), "does not work on a CPU"),
    (("--prompt", "x", "--sampler", "dpmsolver+++"), "must be one of"),
    (("--prompt", "x", "--steps", "0"), "must be"),
    (("--from_file", "nowhere.txt"), "cannot be read"),
    ((), "--prompt or --from_file"),
]


@pytest.mark.parametrize(
    ("more", "said"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_refusals(
    more: tuple[str, ...], said: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(model, tmp_path, *more, status=1)
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err


def test_options_of_the_command_line_hold_for_every_line() -> None:
    words = "--prompt x --ds_depth_1 2 --ds_timesteps_1 800 --ds_depth_2 1 --ds_timesteps_2 500 --ds_ratio 0.4"
    words += " --gradual_latent_timesteps 700 --gradual_latent_ratio 0.6 --gradual_latent_ratio_step 0.2"
    words += " --gradual_latent_ratio_every_n_steps 2 --gradual_latent_s_noise 0.9"
    words += " --gradual_latent_unsharp_params 3,0.5,0.4"
    shared, _ = settle(parse_line("x"), defaults_of(parse(GEN_IMG, words.split()), 512, 8))
    assert shared.deep_shrink == DeepShrink(2, 800, 1, 500, 0.4)
    assert shared.gradual_latent == GradualLatent(700, 0.6, 0.2, 2, 0.9, (3.0, 0.5, 0.4, 1.0))


def test_memory_options_are_given_to_the_model(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiled: list[bool] = []
    original = AutoencoderKL.enable_tiling
    monkeypatch.setattr(AutoencoderKL, "enable_tiling", lambda self: (tiled.append(True), original(self)))
    plain = draw(model, tmp_path / "a", "--prompt", "x --d 1")
    for option in (("--vae_tiling",), ("--vae_slices", "16"), ("--opt_channels_last",)):
        same = draw(model, tmp_path / option[0], "--prompt", "x --d 1", *option)
        assert abs(pixels(same[0]) - pixels(plain[0])).max() <= 2  # one tile holds the whole small picture
    assert len(tiled) == 2
    draw(model, tmp_path / "x", "--prompt", "x", "--diffusers_xformers", status=1)
    assert "--xformers" in capsys.readouterr().err
