"""Full-size SDXL: names, shapes and operations equal the published table, in both directions; counts too."""

from __future__ import annotations

import csv
import gzip
import io
from functools import cache
from pathlib import Path

import torch

from library.checkpoint.io import TensorInfo
from library.checkpoint.sdxl_keys import LOGIT_SCALE
from library.checkpoint.tables import key_map
from library.models import build
from library.models.infer import spec_of_file
from library.models.save import whole_state
from library.models.spec import SDXL

TABLE = Path(__file__).parent / "data" / "keys" / "map_sdxl.tsv.gz"
OPERATIONS = {"transpose_ref_copies": "transpose"}  # the table names what other programs got wrong there


@cache
def table() -> tuple[dict[str, str], ...]:
    text = gzip.decompress(TABLE.read_bytes()).decode("utf-8")
    return tuple(csv.DictReader(io.StringIO(text), delimiter="\t"))


def tensors_with_a_place() -> list[dict[str, str]]:
    return [row for row in table() if row["operation"] != "placeholder"]


def shape_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


@cache
def empty_modules() -> dict[str, torch.nn.Module]:
    texts = {name: build.empty_text_encoder(t) for name, t in zip(SDXL.text_parts, SDXL.text_encoders, strict=True)}
    return {**texts, "unet": build.empty_unet(SDXL.unet), "vae": build.empty_vae(SDXL.vae)}


def test_rows_equal_the_table() -> None:
    ours = {(row.file_key, row.part, row.key, row.operation.value) for row in key_map(SDXL).rows}
    assert ours == {
        (
            row["checkpoint_key"],
            row["component"],
            row["diffusers_key"],
            OPERATIONS.get(row["operation"], row["operation"]),
        )
        for row in tensors_with_a_place()
    }


def test_modules_have_the_diffusers_shapes() -> None:
    ours = {
        (part, key): shape_text(shape)
        for part, module in empty_modules().items()
        for key, shape in build.shapes_of(module).items()
    }
    assert ours == {(row["component"], row["diffusers_key"]): row["diffusers_shape"] for row in tensors_with_a_place()}


def test_saved_file_has_the_checkpoint_shapes() -> None:
    tensors, notes = whole_state(SDXL, empty_modules())
    ours = {key: shape_text(value.shape) for key, value in tensors.items()}
    # without a source its logit scale is not known, so it is not written
    assert ours == {row["checkpoint_key"]: row["checkpoint_shape"] for row in tensors_with_a_place()}
    assert set(ours) | {LOGIT_SCALE} == {row["checkpoint_key"] for row in table()}
    assert (len(ours) + 1, notes) == (2514, {})


def test_spec_is_recognised_from_the_published_header() -> None:
    def sides(text: str) -> tuple[int, ...]:
        return () if text == "scalar" else tuple(int(side) for side in text.split("x"))

    infos = {row["checkpoint_key"]: TensorInfo("F16", sides(row["checkpoint_shape"])) for row in table()}
    assert spec_of_file(infos, "sdxl") == SDXL
    assert key_map(SDXL, infos).check(infos, "sdxl") == []


def test_parameter_counts() -> None:
    counts = {part: sum(tensor.numel() for tensor in module.parameters()) for part, module in empty_modules().items()}
    assert counts == {
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "unet": 2_567_463_684,
        "vae": 83_653_863,
    }
