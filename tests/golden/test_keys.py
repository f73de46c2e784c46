"""Full-size SD1.5 and SD2.1: names, shapes and operations equal the published tables, in both directions."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path

import pytest
import torch

from library.checkpoint.io import TensorInfo
from library.checkpoint.sd_keys import key_map
from library.models import build
from library.models.infer import spec_of_file
from library.models.save import whole_state
from library.models.spec import SD1, SD2, ArchitectureSpec

DATA = Path(__file__).parent / "data" / "keys"
MODELS = [("sd15", SD1), ("sd21", SD2)]


def table(name: str) -> list[dict[str, str]]:
    text = gzip.decompress((DATA / f"map_{name}.tsv.gz").read_bytes()).decode("utf-8")
    return list(csv.DictReader(io.StringIO(text), delimiter="\t"))


def shape_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def empty_modules(spec: ArchitectureSpec) -> dict[str, torch.nn.Module]:
    return {
        "text_encoder": build.empty_text_encoder(spec.text_encoders[0]),
        "unet": build.empty_unet(spec.unet),
        "vae": build.empty_vae(spec.vae),
    }


@pytest.mark.parametrize(("name", "spec"), MODELS)
def test_rows_equal_the_table(name: str, spec: ArchitectureSpec) -> None:
    ours = {(row.file_key, row.part, row.key, row.operation.value) for row in key_map(spec).rows}
    theirs = {
        (row["checkpoint_key"], row["component"], row["diffusers_key"], row["operation"])
        for row in table(name)
        if row["operation"] != "placeholder"
    }
    assert ours == theirs


@pytest.mark.parametrize(("name", "spec"), MODELS)
def test_modules_have_the_diffusers_shapes(name: str, spec: ArchitectureSpec) -> None:
    ours = {
        (part, key): shape_text(shape)
        for part, module in empty_modules(spec).items()
        for key, shape in build.shapes_of(module).items()
    }
    rows = [row for row in table(name) if row["operation"] != "placeholder"]
    assert ours == {(row["component"], row["diffusers_key"]): row["diffusers_shape"] for row in rows}


@pytest.mark.parametrize(("name", "spec"), MODELS)
def test_saved_file_has_the_checkpoint_shapes(name: str, spec: ArchitectureSpec) -> None:
    tensors, _ = whole_state(spec, empty_modules(spec))
    ours = {key: shape_text(value.shape) for key, value in tensors.items()}
    assert ours == {row["checkpoint_key"]: row["checkpoint_shape"] for row in table(name)}


@pytest.mark.parametrize(("name", "spec"), MODELS)
def test_spec_is_recognised_from_the_published_header(name: str, spec: ArchitectureSpec) -> None:
    def sides(text: str) -> tuple[int, ...]:
        return () if text == "scalar" else tuple(int(side) for side in text.split("x"))

    infos = {row["checkpoint_key"]: TensorInfo("F32", sides(row["checkpoint_shape"])) for row in table(name)}
    assert spec_of_file(infos, name) == spec


def test_parameter_counts() -> None:
    counts = {
        (name, part): sum(tensor.numel() for tensor in module.parameters())
        for name, spec in MODELS
        for part, module in empty_modules(spec).items()
    }
    assert counts == {
        ("sd15", "text_encoder"): 123_060_480,
        ("sd15", "unet"): 859_520_964,
        ("sd15", "vae"): 83_653_863,
        ("sd21", "text_encoder"): 340_387_840,
        ("sd21", "unet"): 865_910_724,
        ("sd21", "vae"): 83_653_863,
    }
