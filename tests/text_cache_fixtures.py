"""What tests of the text encoder cache share: toy encoders that count their work, and small data sets with captions."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.data.records import CaptionRules, ResolvedDataset
from library.data.text_cache import TextOutputs, TextStore
from library.families.sdxl import SdxlFamily
from library.options import TextCacheOptions
from library.text.tokens import TextSettings
from library.training.caching import WorkShare
from library.training.text_caching import CaptionEncoder, TextCachingReport, cache_captions
from tests.data_fixtures import cover_fit, dataset, record, write_picture
from tests.toy import toy_modules, toy_spec

FAMILY = SdxlFamily()


@dataclass(frozen=True)
class Counting(CaptionEncoder):
    """Notes the captions of each call."""

    calls: list[list[str]] = field(default_factory=list)

    def __call__(self, captions: Sequence[str]) -> list[TextOutputs]:
        self.calls.append(list(captions))
        return super().__call__(captions)

    @property
    def captions(self) -> list[str]:
        return [caption for call in self.calls for caption in call]


@functools.cache
def _toy_encoders(seed: int) -> tuple[nn.Module, ...]:
    modules = toy_modules("sdxl", seed)
    return modules["text_encoder"].eval(), modules["text_encoder_2"].eval()


def encoder(seed: int = 0, max_token_length: int | None = None, dtype: torch.dtype = torch.float32) -> Counting:
    """Toy encoders of one's own, of a seed, in a type."""
    encoders = tuple(copy.deepcopy(module).to(dtype) for module in _toy_encoders(seed))
    return Counting(FAMILY, encoders, toy_spec("sdxl").text_encoders, TextSettings(max_token_length))


def captioned(folder: Path, captions: dict[str, str], **rules: Any) -> ResolvedDataset:
    """Images with these captions by file name, each in a caption file beside the image."""
    records = []
    for name, text in captions.items():
        path = folder / name
        if not path.exists():
            write_picture(path, (32, 32))
        source = path.with_suffix(path.suffix + ".txt")
        if not source.exists() or source.read_text() != text:
            source.write_text(text)
        records.append(replace(record(path, (32, 32)), caption=text, caption_path=str(source)))
    return dataset(records, [cover_fit((32, 32), (32, 32))] * len(records), captions=CaptionRules(**rules))


def cache(
    datasets: Sequence[ResolvedDataset],
    encode: CaptionEncoder,
    disk: bool = True,
    variants: int | None = None,
    memory_dtype: torch.dtype = torch.float32,
    share: WorkShare | None = None,
) -> tuple[TextStore, TextCachingReport]:
    options = TextCacheOptions(
        cache_text_encoder_outputs=True,
        cache_text_encoder_outputs_to_disk=disk,
        cache_text_encoder_outputs_variants=variants,
    )
    return cache_captions(datasets, encode, options, memory_dtype=memory_dtype, share=share)
