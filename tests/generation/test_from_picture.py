"""Runs that begin from pictures: sizes, strengths, kept pixels, names, prompts of pictures, repeating."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.generation.app import run
from library.generation.from_picture import is_inpainting
from library.log import UserError
from library.options.scripts import GEN_IMG
from tests.generation.engines import job, pixels, toy_engine, write_mask, write_picture
from tests.toy import write_toy_checkpoint

WHITE = (16, 16, 48, 56)
SAMPLERS = ("ddim", "pndm", "lms", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy") / "toy.safetensors", "sd1")


@pytest.fixture(scope="module")
def model_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy") / "xl.safetensors", "sdxl")


def draw(model: Path, out: Path, *more: str, status: int = 0) -> list[Path]:
    short = [] if "--from_image" in more else ["--steps", "4", "--sampler", "euler"]  # pictures tell theirs
    assert run(GEN_IMG, ["--ckpt", str(model), "--outdir", str(out), *short, *more]) == status
    return sorted(out.glob("*.png"))


@pytest.fixture
def source(tmp_path: Path) -> str:
    return write_picture(tmp_path / "source.png", (100, 84))


@pytest.mark.parametrize(
    ("options", "in_line", "size"),
    [
        ((), "", (96, 80)),
        (("--W", "64", "--H", "128"), "", (64, 128)),
        ((), " --w 72 --h 64", (72, 64)),
        (("--W", "200"), "", (200, 168)),
        (("--highres_fix_scale", "0.5", "--highres_fix_steps", "2"), "", (96, 80)),
    ],
)
def test_size(
    model: Path, tmp_path: Path, source: str, options: tuple[str, ...], in_line: str, size: tuple[int, int]
) -> None:
    (drawn,) = draw(model, tmp_path / "out", "--image_path", source, "--prompt", "a cat" + in_line, *options)
    with Image.open(drawn) as picture:
        assert picture.size == size


def test_size_of_sdxl_is_a_multiple_of_32(model_sdxl: Path, tmp_path: Path, source: str) -> None:
    (drawn,) = draw(model_sdxl, tmp_path / "out", "--image_path", source, "--prompt", "a cat", "--no_half_vae")
    assert pixels(drawn).shape == (64, 96, 3)


def test_strength(tmp_path: Path) -> None:
    """0 leaves the picture as the VAE shows it; more strength is farther from it; 1 takes all steps."""
    engine = toy_engine()
    files = {"source": write_picture(tmp_path / "a.png"), "mask": None}
    calls: list[int] = []
    engine.on_progress = lambda: calls.append(1)
    pictures = {strength: engine.draw([job(files=files, strength=strength)]) for strength in (0.0, 0.2, 0.6, 1.0)}
    assert len(calls) == 0 + 1 + 3 + 5
    distances = [(pictures[strength] - pictures[0.0]).abs().mean() for strength in (0.2, 0.6, 1.0)]
    assert 0.01 < distances[0] < distances[1] < distances[2]
    assert not torch.equal(pictures[1.0], engine.draw([job()]))


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_the_mask_does_not_show_stays_bit_for_bit(name: str, tmp_path: Path) -> None:
    source, mask = write_picture(tmp_path / "a.png"), write_mask(tmp_path / "m.png", WHITE)
    engine = toy_engine()
    files = {"source": source, "mask": mask}
    found = (engine.draw([job(files=files, sampler=name)])[0] / 2 + 0.5).clamp(0, 1) * 255
    drawn, own = found.round().permute(1, 2, 0).numpy().astype(int), pixels(source)
    kept = np.ones((64, 64), bool)
    kept[WHITE[1] : WHITE[3], WHITE[0] : WHITE[2]] = False
    assert np.array_equal(drawn[kept], own[kept])
    assert np.abs(drawn[~kept] - own[~kept]).mean() > 5


def test_the_edge_of_what_is_drawn_fades_into_what_is_kept(tmp_path: Path) -> None:
    files = {"source": write_picture(tmp_path / "a.png"), "mask": write_mask(tmp_path / "m.png", WHITE)}
    paste: Any = toy_engine().after_decode[0]
    source = torch.from_numpy(pixels(files["source"])).permute(2, 0, 1) / 127.5 - 1
    share = (paste([job(files=files)], torch.full((1, 3, 64, 64), 2.0))[0] - source) / (2 - source)
    row = share[:, 36].mean(dim=0)  # through the middle of the white box
    assert bool((row[: WHITE[0]] == 0).all())
    assert 0 < float(row[WHITE[0]]) < float(row[WHITE[0] + 1]) < 1
    assert float(row[32]) == pytest.approx(1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_kept_latents_end_without_noise(name: str, tmp_path: Path) -> None:
    files = {"source": write_picture(tmp_path / "a.png"), "mask": write_mask(tmp_path / "m.png", WHITE)}
    engine = toy_engine()
    own = engine.draw_latents([job(files={**files, "mask": None}, sampler=name, strength=0.0)])
    found = engine.draw_latents([job(files=files, sampler=name)])
    assert torch.equal(found[:, :, :2], own[:, :, :2])
    assert (found - own)[:, :, 3:6, 3:5].abs().mean() > 0.05


def test_an_empty_mask_keeps_all_and_a_white_one_nothing(tmp_path: Path) -> None:
    source = write_picture(tmp_path / "a.png")
    engine = toy_engine()
    black, white = (write_mask(tmp_path / f"{n}.png", (0, 0, n, n)) for n in (0, 64))
    plain = engine.draw([job(files={"source": source})])
    assert torch.equal(engine.draw([job(files={"source": source, "mask": white})]), plain)
    kept = engine.draw([job(files={"source": source, "mask": black})])
    assert np.array_equal(((kept[0] + 1) * 127.5).round().permute(1, 2, 0).numpy(), pixels(source))


def test_inpainting_in_two_stages_keeps_pixels(model: Path, tmp_path: Path) -> None:
    source, mask = (
        write_picture(tmp_path / "a.png", (128, 128)),
        write_mask(tmp_path / "m.png", (32, 32, 96, 96), (128, 128)),
    )
    both = draw(
        model, tmp_path / "out", "--image_path", source, "--mask_path", mask, "--prompt", "a cat --d 5",
        "--highres_fix_scale", "0.5", "--highres_fix_steps", "3", "--highres_fix_save_1st", "--sequential_file_name",
    )  # fmt: skip
    assert [path.name for path in both] == ["im_0000001.png", "im_1000001.png"]
    small, large = (pixels(path) for path in both)
    assert (small.shape, large.shape) == ((64, 64, 3), (128, 128, 3))
    kept = np.ones((128, 128), bool)
    kept[32:96, 32:96] = False
    assert np.array_equal(large[kept], pixels(source)[kept])
    assert np.abs(large[~kept] - pixels(source)[~kept]).mean() > 5
    half = np.asarray(Image.open(source).resize((64, 64), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(small[kept[::2, ::2]] - half[kept[::2, ::2]]).max() <= 1


def test_the_same_picture_alone_in_a_batch_and_after_others(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(2):
        write_picture(folder / f"{index}.png", seed=index)
    file = tmp_path / "p.txt"
    file.write_text("a cat --d 1\na dog --d 2\na bird --d 3\n")
    mask = write_mask(tmp_path / "m.png", WHITE)
    options = ("--from_file", str(file), "--image_path", str(folder), "--mask_path", mask, "--sequential_file_name")
    single = draw(model, tmp_path / "a", *options, "--sampler", "euler_a")
    batch = draw(model, tmp_path / "b", *options, "--sampler", "euler_a", "--batch_size", "3")
    for one, other in zip(single, batch, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1
    # pictures are taken in turn: the third one begins from the first picture again
    kept = (slice(0, 16), slice(0, 64))
    assert np.array_equal(pixels(single[2])[kept], pixels(folder / "0.png")[kept])
    assert np.array_equal(pixels(single[1])[kept], pixels(folder / "1.png")[kept])
    again = draw(model, tmp_path / "c", "--prompt", "a cat --d 1", "--sampler", "euler_a", "--W", "64", "--H", "64")
    assert np.abs(pixels(again[0]) - pixels(single[0])).max() > 5  # nothing of it stays for other runs


def test_a_mask_needs_a_picture(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mask = write_mask(tmp_path / "m.png", WHITE)
    size = ("--W", "64", "--H", "64")
    assert not draw(model, tmp_path / "out", "--mask_path", mask, "--prompt", "a cat", *size, status=1)
    assert "--mask_path has no meaning here: give the picture" in caplog.text


def test_the_mask_of_sub_prompts_is_not_for_inpainting(model: Path, tmp_path: Path) -> None:
    source, mask = write_picture(tmp_path / "a.png"), write_mask(tmp_path / "m.png", WHITE)
    files = ("--image_path", source, "--mask_path", mask)
    (regions,) = draw(model, tmp_path / "a", *files, "--prompt", "a cat AND a dog --d 1")
    (inpainted,) = draw(model, tmp_path / "b", *files, "--prompt", "a cat --d 1")
    assert np.array_equal(pixels(inpainted)[:16], pixels(source)[:16])
    assert np.abs(pixels(regions)[:16] - pixels(source)[:16]).max() > 5


def test_when_a_mask_is_for_inpainting() -> None:
    assert not is_inpainting(job())
    with_picture = {"source": "a.png", "mask": "m.png"}
    assert is_inpainting(job(files=with_picture))
    assert is_inpainting(job(files=with_picture, multipliers=(1.0,)))
    assert not is_inpainting(job(files=with_picture, parts=2, regional=True))
    assert not is_inpainting(job(files={"mask": "m.png"}, multipliers=(1.0,), regional=True))
    with pytest.raises(UserError, match="--image_path"):
        is_inpainting(job(files={"mask": "m.png"}))


def test_names_of_the_originals(model: Path, tmp_path: Path, source: str) -> None:
    options = ("--image_path", source, "--prompt", "a cat", "--use_original_file_name", "--images_per_prompt", "2")
    highres = ("--highres_fix_scale", "0.5", "--highres_fix_steps", "2", "--highres_fix_save_1st")
    names = [path.name for path in draw(model, tmp_path / "out", *options, *highres)]
    assert names == ["source.png", "source_2.png", "source_first.png", "source_first_2.png"]


def write_with_text(path: Path, prompt: str | None, negative: str | None = None, seed: int = 0) -> None:
    write_picture(path, seed=seed)
    info = PngInfo()
    for key, value in (("prompt", prompt), ("negative-prompt", negative)):
        if value is not None:
            info.add_text(key, value)
    with Image.open(path) as image:
        picture = image.copy()
    picture.save(path, pnginfo=info)


def test_prompts_of_pictures_stay_with_their_pictures_and_masks(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures, masks = tmp_path / "in", tmp_path / "masks"
    pictures.mkdir()
    masks.mkdir()
    write_with_text(pictures / "0.png", "a red cat", "dull", seed=0)
    write_with_text(pictures / "1.png", None, seed=1)
    write_with_text(pictures / "2.png", "a blue dog", seed=2)
    for index in range(3):
        write_mask(masks / f"{index}.png", (0, 16 * index, 64, 16 * index + 16))
    with caplog.at_level(logging.WARNING):
        drawn = draw(
            model, tmp_path / "out", "--image_path", str(pictures), "--mask_path", str(masks),
            "--images_per_prompt", "2", "--use_original_file_name",
        )  # fmt: skip
    assert [path.name for path in drawn] == ["0.png", "0_2.png", "2.png", "2_2.png"]
    assert "1.png" in caplog.text
    told = [Image.open(path).info for path in drawn]
    assert [(info["prompt"], info["negative-prompt"]) for info in told] == [("a red cat", "dull")] * 2 + [
        ("a blue dog", "")
    ] * 2
    kept = slice(0, 32)
    assert np.array_equal(pixels(drawn[2])[kept], pixels(pictures / "2.png")[kept])  # its own mask: the third
    assert not np.array_equal(pixels(drawn[2])[32:48], pixels(pictures / "2.png")[32:48])


def test_no_prompt_anywhere(model: Path, tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    draw(model, tmp_path / "out", "--image_path", source, status=1)
    assert "there is no prompt in the pictures" in capsys.readouterr().err


@pytest.mark.parametrize("highres", [False, True])
def test_repeating_bit_for_bit(model: Path, tmp_path: Path, source: str, highres: bool, monkeypatch) -> None:
    mask = write_mask(tmp_path / "m.png", (20, 20, 60, 60), (100, 84))
    more = ["--highres_fix_scale", "0.5", "--highres_fix_steps", "3", "--highres_fix_save_1st"] if highres else []
    options = ("--image_path", source, "--mask_path", mask, "--prompt", "a cat --d 5 --t 0.7", *more)
    first = draw(model, tmp_path / "a", *options)
    assert len(first) == (2 if highres else 1)
    for index, path in enumerate(first):
        assert str(tmp_path) not in Image.open(path).info["sd-trainer"]
        again = draw(
            model, tmp_path / f"b{index}", "--from_image", str(path), "--image_path", source, "--mask_path", mask
        )
        assert np.array_equal(pixels(again[-1]), pixels(path))
    monkeypatch.chdir(tmp_path)
    here = draw(model, tmp_path / "c", "--from_image", str(first[-1]))  # found beside, by its name
    assert np.array_equal(pixels(here[-1]), pixels(first[-1]))


def test_repeating_without_the_picture(
    model: Path, tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (first,) = draw(model, tmp_path / "a", "--image_path", source, "--prompt", "a cat")
    Path(source).unlink()
    draw(model, tmp_path / "b", "--from_image", str(first), status=1)
    assert "source.png" in (said := capsys.readouterr().err)
    assert "--image_path" in said


def test_pictures_are_encoded_once(tmp_path: Path) -> None:
    engine = toy_engine()
    files = {"source": write_picture(tmp_path / "a.png")}
    posteriors: list[int] = []
    encode = engine.posterior
    engine.posterior = lambda pictures: (posteriors.append(len(pictures)), encode(pictures))[1]
    first = engine.draw([job(1, files), job(2, files)])
    assert torch.allclose(engine.draw([job(2, files)])[0], first[1], atol=1e-5)
    assert posteriors == [1]
    engine.draw([job(1, files, width=128)])
    assert posteriors == [1, 1]


def test_latents_that_are_no_numbers_are_told_and_not_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from library.generation.engine import Engine

    whole = Engine.draw

    def broken(self: Engine, batch: object) -> torch.Tensor:
        pictures = whole(self, batch)  # type: ignore[arg-type]
        pictures[0] = float("nan")
        return pictures

    monkeypatch.setattr(Engine, "draw", broken)
    options = ("--prompt", "a cat", "--images_per_prompt", "2", "--batch_size", "2", "--W", "64", "--H", "64")
    assert len(draw(model, tmp_path / "out", *options, status=1)) == 1
    assert "NaN" in caplog.text
