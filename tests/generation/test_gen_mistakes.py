"""Command lines of gen_img.py that are wrong, or interrupted: what is said, and what is drawn all the same."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from library.checkpoint.io import WriteError
from library.generation import output
from library.generation.app import run
from library.generation.denoise import Denoising
from library.generation.lines import parse_line
from library.generation.repeat import read_repeat
from library.log import UserError
from library.options.script import parse
from library.options.scripts import GEN_IMG, SDXL_GEN_IMG
from tests.generation.test_gen_img import SHORT, draw, entries, lines, pixels
from tests.generation_fixtures import make_job
from tests.toy import write_toy_checkpoint

GPU_FULL = "CUDA out of memory. Tried to allocate 20.00 GiB"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy") / "toy.safetensors", "sd1")


def prompts(made: list[Path]) -> list[str]:
    return [entries(path)["prompt"] for path in made]


def fail_once(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """The first picture cannot be drawn."""
    original, left = Denoising.run, [error]

    def drawing(self: Denoising, latents: Any) -> Any:
        if left:
            raise left.pop()
        return original(self, latents)

    monkeypatch.setattr(Denoising, "run", drawing)


def interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while each picture is drawn."""
    original = Denoising.run

    def drawing(self: Denoising, latents: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, latents)

    monkeypatch.setattr(Denoising, "run", drawing)


# ---- pictures that tell nonsense of themselves


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("job", "source"), 1.5),
        (("job", "clip_prompt"), True),
        (("job", "seed"), "x"),
        (("job", "guides"), [None]),
        (("job", "shared", "width"), 10**30),
        (("job", "shared", "steps"), 10**9),
        (("job", "shared", "scale"), "5"),
        (("job", "shared", "sampler"), "magic"),
        (("job", "shared", "sizes", "crop_top"), []),
        (("options", "scale"), "x"),
        (("options",), []),
        (("place",), [0, 10**12]),
    ],
)
def test_pictures_that_tell_nonsense_of_themselves(place: tuple[str, ...], value: object, tmp_path: Path) -> None:
    """Anyone can write into a picture: what is no recipe is one line that names the file, before a model is loaded."""
    recipe: Any = json.loads(output.text_entries(make_job("a cat"), "euler", {"options": {}}, False)[output.RECIPE])
    path = tmp_path / "a.png"
    settings = parse(GEN_IMG, ["--from_image", str(path)])
    output.write_png(Image.new("RGB", (8, 8)), path, {output.RECIPE: json.dumps(recipe)})
    assert read_repeat(settings, str(path)).job.prompt == "a cat"
    table = recipe
    for key in place[:-1]:
        table = table[key]
    table[place[-1]] = value
    output.write_png(Image.new("RGB", (8, 8)), path, {output.RECIPE: json.dumps(recipe)})
    with pytest.raises(UserError, match=r"a\.png: what it tells of its making is damaged"):
        read_repeat(settings, str(path))


# ---- memory


def test_a_picture_too_large_for_the_memory_does_not_end_the_others(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fail_once(monkeypatch, RuntimeError(GPU_FULL))
    file = lines(tmp_path, "large --w 128 --d 1", "small --d 2")
    assert prompts(draw(model, tmp_path / "out", "--from_file", str(file), status=1)) == ["small"]
    assert "large --w 128 --d 1: out of memory at 128x64 pixels" in caplog.text


# ---- pictures that are drawn again


def again(model: Path, out: Path, *more: str, status: int = 0) -> list[Path]:
    assert run(GEN_IMG, ["--ckpt", str(model), "--outdir", str(out), *more]) == status
    return sorted(out.glob("*.png"))


def test_options_win_over_what_a_picture_tells(model: Path, tmp_path: Path) -> None:
    (first,) = draw(model, tmp_path / "a", "--prompt", "a cat --d 1 --s 4 --l 3")
    told = ("--steps", "3", "--scale", "5", "--sampler", "euler", "--seed", "9", "--W", "96", "--H", "64")
    (other,) = again(model, tmp_path / "b", "--from_image", str(first), *told)
    (wanted,) = again(model, tmp_path / "c", "--prompt", "a cat", *told)
    assert pixels(other).tolist() == pixels(wanted).tolist()
    assert {key: entries(other)[key] for key in ("steps", "scale", "sampler", "seed")} == {
        "steps": "3",
        "scale": "5.0",
        "sampler": "euler",
        "seed": "9",
    }
    shrunk = ("--ds_depth_1", "1", "--ds_timesteps_1", "0", "--gradual_latent_timesteps", "900")
    (changed,) = again(model, tmp_path / "d", "--from_image", str(first), *shrunk)
    recipe = entries(changed)["sd-trainer"]
    assert '"depth_1": 1, "timesteps_1": 0' in recipe
    assert '"timesteps": 900' in recipe


def test_a_repeated_picture_can_be_repeated(model: Path, tmp_path: Path) -> None:
    more = ("--prompt", "a (cat:1.4) --d 1", "--clip_skip", "2", "--emb_normalize_mode", "none")
    found = draw(model, tmp_path / "0", *more)
    for name in "12":
        found += again(model, tmp_path / name, "--from_image", str(found[-1]))
    assert pixels(found[0]).tolist() == pixels(found[1]).tolist() == pixels(found[2]).tolist()


def test_pictures_that_cannot_be_repeated_are_all_told_before_any_is_drawn(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (good,) = draw(model, tmp_path / "a", "--prompt", "a cat --d 1")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    wrong = [str(tmp_path / "x.png"), str(tmp_path / "gone.png")]
    assert not again(model, tmp_path / "b", "--from_image", str(good), *wrong, status=1)
    said = capsys.readouterr().err
    assert all(path in said for path in wrong)


def test_ctrl_c_ends_repeating(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = draw(model, tmp_path / "a", "--prompt", "a cat", "--images_per_prompt", "3")
    interrupt(monkeypatch)
    assert len(again(model, tmp_path / "b", "--from_image", *map(str, found))) == 1


def test_a_plan_of_pictures_is_refused_rather_than_drawn(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (good,) = draw(model, tmp_path / "a", "--prompt", "a cat --d 1")
    assert not again(model, tmp_path / "b", "--from_image", str(good), "--dry_run", status=1)
    assert "--dry_run" in capsys.readouterr().err


# ---- told early

GONE = "gone.safetensors: there is no such file"
EARLY = [
    (("--textual_inversion_embeddings", "gone.safetensors"), f"--textual_inversion_embeddings {GONE}"),
    (("--XTI_embeddings", "gone.safetensors"), f"--XTI_embeddings {GONE}"),
    (("--hypernetwork_weights", "gone.safetensors"), f"--hypernetwork_weights {GONE}"),
    (("--network_weights", "gone.safetensors"), f"--network_weights {GONE}"),
    (("--grid_networks", "gone*.safetensors"), "--grid_networks gone*.safetensors: there is no such file"),
    (("--network_weights", __file__, "--network_module", "networks.gone"), "there is no module networks.gone"),
    (("--from_module", "gone.safetensors"), f"--from_module {GONE}"),
    (("--gradual_latent_unsharp_params", "3,x"), "--gradual_latent_unsharp_params 3,x"),
    (("--highres_fix_scale", "0.5", "--highres_fix_upscaler", "tools.gone"), "--highres_fix_upscaler tools.gone"),
    (("--outdir", __file__), "--outdir"),
]


@pytest.mark.parametrize(("more", "said"), EARLY, ids=lambda value: value[0] if isinstance(value, tuple) else "")
def test_mistakes_are_told_before_the_model_is_looked_for(
    more: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--ckpt", "nowhere.safetensors", "--outdir", str(tmp_path), "--prompt", "x", *more]
    assert run(GEN_IMG, [word for word in words if "--from_module" not in more or word not in ("--prompt", "x")]) == 1
    err = capsys.readouterr().err
    assert said in err
    assert "nowhere" not in err


def test_all_such_mistakes_are_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ("--textual_inversion_embeddings", "a.pt", "b.pt", "--network_weights", "c.pt")
    assert run(GEN_IMG, ["--ckpt", "nowhere", "--outdir", str(tmp_path), "--prompt", "x", *wrong]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_a_folder_that_cannot_be_written_ends_the_run_at_its_first_picture(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[int] = []
    original = Denoising.run

    def count(self: Denoising, latents: Any) -> Any:
        drawn.append(1)
        return original(self, latents)

    def refuse(*_: object) -> Path:
        raise WriteError("the disk is full")

    monkeypatch.setattr(Denoising, "run", count)
    monkeypatch.setattr(output, "write_png", refuse)
    assert not draw(model, tmp_path / "out", "--prompt", "x", "--images_per_prompt", "9", status=1)
    assert len(drawn) <= 2  # the second may have begun while the first was written
    assert "the disk is full" in capsys.readouterr().err


def test_a_folder_without_permission_is_told_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert run(GEN_IMG, ["--ckpt", "nowhere", "--outdir", str(tmp_path), "--prompt", "x"]) == 1
    assert f"--outdir {tmp_path}: no permission" in capsys.readouterr().err


# ---- the keyboard, files and modules


def test_ctrl_c_at_the_keyboard_asks_for_no_further_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "a cat")
    interrupt(monkeypatch)
    assert len(draw(model, tmp_path, "--interactive", "--no_preview")) == 1
    assert len(asked) == 1


def test_ctrl_c_instead_of_a_line_ends_like_the_end_of_input(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wait(text: str = "") -> str:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the first one is enough")

    monkeypatch.setattr("builtins.input", wait)
    assert not draw(model, tmp_path, "--interactive", "--no_preview")
    assert "stopping" not in caplog.text


def test_a_line_in_another_encoding_is_left_out(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    typed = io.TextIOWrapper(io.BytesIO(b"caf\xe9 --d 1\na dog --d 2\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", typed)
    assert prompts(draw(model, tmp_path / "a", "--interactive", "--no_preview", status=1)) == ["a dog"]
    assert "line 1: there are letters in it that are not UTF-8" in caplog.text
    assert not draw(model, tmp_path / "b", "--prompt", os.fsdecode(b"caf\xe9"), status=1)


@pytest.mark.parametrize("name", ["prompts.toml", "prompts.json"])
def test_prompt_files_of_the_trainers_are_not_drawn_line_by_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text('[prompt]\nprompt = "a cat"\n')
    assert run(GEN_IMG, ["--ckpt", "nowhere", "--outdir", str(tmp_path), "--from_file", str(tmp_path / name)]) == 1
    assert "must be plain text" in capsys.readouterr().err


MODULES = {
    "raise KeyError('x')": "KeyError: 'x'",
    "return 5": "gave 5; must be text",
}


@pytest.mark.parametrize("body", MODULES)
def test_what_a_prompt_module_does_wrong_is_one_line(
    body: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "words.py"
    file.write_text(f"def get_prompter(args, pipe, networks):\n    def line(*_):\n        {body}\n    return line\n")
    draw(model, tmp_path / "out", "--from_module", str(file), status=1)
    assert MODULES[body] in capsys.readouterr().err
    draw(model, tmp_path / "out", "--from_module", str(file), "--shuffle_prompts", status=1)
    assert "shuffle" in capsys.readouterr().err


def test_what_is_too_long_to_be_read_is_told_once(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = "begin " + "word " * 80
    more = ("--max_embeddings_multiples", "1", "--images_per_prompt", "2")
    draw(model, tmp_path / "a", "--prompt", f"{long}--n {long}", *more)
    told = [line for line in caplog.messages if "longer than 75 tokens" in line]
    assert len(told) == 1  # prompt and negative prompt are the same text but for a blank
    assert "--max_embeddings_multiples" in told[0]
    caplog.clear()
    draw(model, tmp_path / "b", "--prompt", long)
    assert "longer than" not in caplog.text


# ---- lines and options


def test_blanks_before_a_value_do_not_matter() -> None:
    line = parse_line("a cat --n  blurry, grey --w   512")
    assert line.options == {"negative_prompt": "blurry, grey", "width": 512}
    assert not line.notes


def test_growing_every_no_steps_is_refused() -> None:
    line = parse_line("a cat --gle 0")
    assert not line.options
    assert "must be at least 1" in line.notes[0]


DOUBTED = {
    "--prompt a --from_file b": "--prompt: no effect, --from_file says what is drawn",
    "--from_image a --prompt b": "--prompt: no effect, --from_image says what is drawn",
    "--from_image a --n_iter 2": "--n_iter: no effect",
    "--prompt a --strength 0.5": "--strength has no effect without --image_path",
    "--prompt a --guide_image_path b": "--guide_image_path has no effect without",
    "--prompt a --grid_weights 1,2": "--grid_weights has no effect without",
    "--prompt a --network_merge": "--network_merge has no effect without",
}


@pytest.mark.parametrize("words", DOUBTED)
def test_options_without_effect_are_told(words: str) -> None:
    assert DOUBTED[words] in "\n".join(parse(GEN_IMG, ["--ckpt", "x", *words.split()]).warnings)


@pytest.mark.parametrize("words", ["--clip_skip 1", "--zero_terminal_snr"])
def test_what_acts_in_drawing_is_not_called_without_effect(words: str) -> None:
    assert not parse(SDXL_GEN_IMG, ["--ckpt", "x", "--prompt", "a", *words.split()]).warnings


def test_the_script_for_sdxl_names_the_script_for_others(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(SDXL_GEN_IMG, ["--ckpt", str(model), "--outdir", str(tmp_path), *SHORT, "--prompt", "x"]) == 1
    assert "draw it with gen_img.py" in capsys.readouterr().err


def test_a_hub_id_is_taken_for_sd1(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As there, where nothing is looked at; a wrong guess is told by the model itself."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with caplog.at_level(logging.INFO):
        assert run(GEN_IMG, ["--ckpt", "owner/name", "--outdir", str(tmp_path), "--prompt", "x"]) == 1
    assert "taken for a model of SD 1.x" in caplog.text
    assert "--ckpt owner/name" in capsys.readouterr().err
