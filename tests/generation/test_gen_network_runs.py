"""Whole runs of the generator with networks, regions and embeddings, by their command lines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.generation.app import run
from library.options.scripts import GEN_IMG
from tests.generation_fixtures import write_mask, write_network
from tests.toy import write_toy_checkpoint

GREEN, RED = (0, 255, 0), (255, 0, 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_checkpoint(tmp_path_factory.mktemp("model") / "toy.safetensors")


@pytest.fixture(scope="module")
def networks(model: Path) -> list[str]:
    return [write_network(model.with_name(f"net{seed}.safetensors"), seed=seed) for seed in (1, 2)]


def draw(model: Path, folder: Path, lines: str | None, *more: str, status: int = 0) -> list[np.ndarray]:
    """The pictures in the order of their lines."""
    folder.mkdir(exist_ok=True)
    out = folder / "out"
    asked: list[str] = []
    if lines is not None:
        (folder / "prompts.txt").write_text(lines, encoding="utf-8")
        asked = ["--from_file", str(folder / "prompts.txt")]
    command = ["--ckpt", str(model), *asked, "--outdir", str(out), "--sequential_file_name", "--steps", "3"]
    assert run(GEN_IMG, [*command, "--sampler", "euler", "--seed", "5", *more]) == status
    return [np.asarray(Image.open(path)).astype(int) for path in sorted(out.glob("*.png"))]


def test_strengths_of_lines_do_not_leak(model: Path, networks: list[str], tmp_path: Path) -> None:
    lines = ["a cat --d 1", "a cat --d 1 --am 0,0", "a cat --d 1 --am 0.5", "a cat --d 1", "a dog --d 2 --am -1,1"]
    with_networks = ["--network_weights", *networks, "--network_mul", "1", "0.3"]
    mixed = draw(model, tmp_path / "mixed", "\n".join(lines), *with_networks, "--batch_size", "2")
    assert len(mixed) == 5
    for number in (0, 1, 2, 4):
        (alone,) = draw(model, tmp_path / f"{number}", lines[number], *with_networks)
        assert np.abs(mixed[number] - alone).max() <= 1
    assert np.abs(mixed[0] - mixed[3]).max() <= 1
    (plain,) = draw(model, tmp_path / "plain", lines[0])
    assert np.abs(mixed[1] - plain).max() <= 1
    assert np.abs(mixed[0] - plain).max() > 8


def test_regions_by_the_command_line(
    model: Path, networks: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mask = write_mask(tmp_path / "mask.png", [[RED, GREEN]])
    lines = "a cat AND a dog --d 1\na cat AND a dog --d 1 --am 0\na cat --d 1\nthe sea AND a dog --d 1 --nl 2\n"
    more = ["--mask_path", mask, "--network_weights", *networks]
    pictures = draw(model, tmp_path / "regions", lines, *more, status=1)
    assert len(pictures) == 3  # the line with one text for two networks is left out, and said
    assert "line 3" in caplog.text
    assert "need as many sub-prompts" in caplog.text
    assert np.abs(pictures[0] - pictures[1]).max() > 8
    (without,) = draw(model, tmp_path / "without", "a cat AND a dog --d 1", "--mask_path", mask)
    assert np.abs(pictures[1] - without).max() <= 1


def test_a_picture_with_networks_and_regions_is_repeated(model: Path, networks: list[str], tmp_path: Path) -> None:
    mask = write_mask(tmp_path / "mask.png", [[RED, GREEN]])
    torch.save({"v": torch.randn(2, 32, generator=torch.Generator().manual_seed(1))}, tmp_path / "sksx.pt")
    files = ["--network_weights", *networks, "--textual_inversion_embeddings", str(tmp_path / "sksx.pt")]
    told = [*files, "--mask_path", mask]
    (first,) = draw(model, tmp_path / "a", "a sksx AND a dog --d 1 --am 0.7,0.2", *told)
    (picture,) = (tmp_path / "a" / "out").glob("*.png")
    again = ["--from_image", str(picture), "--outdir", str(tmp_path / "again"), "--ckpt", str(model), *told]
    assert run(GEN_IMG, again) == 0
    (repeated,) = (tmp_path / "again").glob("*.png")
    assert np.array_equal(np.asarray(Image.open(repeated)), first)


def test_regions_whose_mask_is_still_there_are_repeated_without_naming_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative names stand in the picture, so the mask is found; its regions must act."""
    monkeypatch.chdir(tmp_path)
    write_mask(Path("mask.png"), [[RED, GREEN]])
    (first,) = draw(model, Path("a"), "a cat AND a dog --d 1", "--mask_path", "mask.png")
    (picture,) = Path("a/out").glob("*.png")
    assert run(GEN_IMG, ["--from_image", str(picture), "--outdir", "again", "--ckpt", str(model)]) == 0
    (repeated,) = Path("again").glob("*.png")
    assert np.array_equal(np.asarray(Image.open(repeated)), first)


def test_and_without_a_mask_is_told(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(draw(model, tmp_path / "and", "a cat AND a dog --d 1")) == 1
    assert "AND does nothing without --mask_path" in caplog.text


def test_a_sheet_of_files_and_strengths(model: Path, networks: list[str], tmp_path: Path) -> None:
    """Each file acts alone: a picture of the grid is that of the file drawn by itself, at 0 that of no file."""
    pattern = str(Path(networks[0]).with_name("net*.safetensors"))
    grid = ["--grid_networks", pattern, "--grid_weights", "0,1", "--sequential_file_name"]
    drawn = draw(model, tmp_path / "grid", "a cat --d 1", *grid)
    assert len(drawn) == 5  # two files times two strengths, and the sheet, which is named grid_...
    sheet, pictures = drawn[0], drawn[1:]
    assert sheet.shape[1] > 2 * pictures[0].shape[1]
    (plain,) = draw(model, tmp_path / "plain", "a cat --d 1")
    for number, network in enumerate(networks):
        (alone,) = draw(model, tmp_path / f"{number}", "a cat --d 1", "--network_weights", network)
        assert np.abs(pictures[2 * number] - plain).max() <= 1
        assert np.abs(pictures[2 * number + 1] - alone).max() <= 1
        assert np.abs(alone - plain).max() > 8


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--grid_networks", "nowhere*.safetensors"), "there is no such file"),
        (("--grid_networks", "NET", "--grid_weights", "1,x"), "must be numbers separated by commas"),
    ],
)
def test_grids_that_cannot_be(
    more: tuple[str, ...],
    said: str,
    model: Path,
    networks: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [networks[0] if word == "NET" else word for word in more]
    assert run(GEN_IMG, ["--ckpt", str(model), "--prompt", "x", "--outdir", str(tmp_path), *words]) == 1
    assert said in capsys.readouterr().err
