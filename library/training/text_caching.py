"""Text encoder outputs made ahead: each caption goes through the frozen encoders once.

B captions, T tokens, D widths of all encoders together.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from library.checkpoint.hashes import weights_fingerprint
from library.data.cache import describe_notes
from library.data.records import ResolvedDataset
from library.data.text_cache import TextLayout, TextOutputs, TextStore, TextTarget, targets_of
from library.families.base import ModelFamily, TextSettings
from library.log import UserError, progress
from library.models.spec import TextEncoderSpec
from library.options import TextCacheOptions
from library.options.settings import Settings
from library.text.tokens import CHUNK_TOKENS
from library.training.caching import WorkShare

logger = logging.getLogger(__name__)

CAPTIONS_AT_ONCE = 16
_PROBE = (
    "A photo of 1girl, (sks:1.2) [dog] in the café at night, 2023! BREAK \u00fcber-long words: internationalisation"
)


def text_cache_options(settings: Settings) -> TextCacheOptions:
    """The run's; all switched off in scripts without them."""
    return settings[TextCacheOptions] if TextCacheOptions in settings else TextCacheOptions()


def layout_of(specs: Sequence[TextEncoderSpec], settings: TextSettings) -> TextLayout:
    """Shapes of what encoders give for a caption: rows are joined, so that two marks are left of all."""
    tokens = CHUNK_TOKENS * settings.max_rows + 2
    return TextLayout(tokens, tuple(spec.width for spec in specs), specs[-1].projection_width)


@dataclass
class TextCachingReport:
    """What caching did in this process. ``total`` and ``reused`` count archives and captions kept in memory,
    ``encoded`` the captions that went through the encoders; ``float32_retries`` names images.
    """

    total: int = 0
    reused: int = 0
    encoded: int = 0
    float32_retries: list[str] = field(default_factory=list)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CaptionEncoder:
    """Frozen text encoders with the settings that training has. Their weights decide the type of the computation."""

    family: ModelFamily
    encoders: tuple[nn.Module, ...]
    specs: tuple[TextEncoderSpec, ...]
    settings: TextSettings

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> list[TextOutputs]:
        """What the encoders give, on the CPU, in their type; at most `CAPTIONS_AT_ONCE` captions go together."""
        outputs: list[TextOutputs] = []
        for first in range(0, len(captions), CAPTIONS_AT_ONCE):
            tokens = self.family.tokenize(list(captions[first : first + CAPTIONS_AT_ONCE]), self.settings)
            condition = self.family.encode(self.encoders, tokens, self.settings)
            hidden_BTD = condition.hidden_BTD.cpu()
            pooled = [None] * len(hidden_BTD) if condition.pooled_BP is None else list(condition.pooled_BP.cpu())
            outputs += [TextOutputs(one, pool) for one, pool in zip(hidden_BTD, pooled, strict=True)]
        return outputs

    def fingerprint(self) -> dict[str, Any]:
        """What decides the outputs of a caption: weights, their type, the tokenizer with its settings.

        The tokenizer is known by the ids that it makes of a text with many kinds of words.
        """
        tokens = hashlib.blake2b(digest_size=8)
        for rows in self.family.tokenize([_PROBE], self.settings).rows:
            tokens.update(f"{tuple(rows.ids_BNT.shape)}".encode() + rows.ids_BNT.numpy().tobytes())
        return {
            "encoders": [weights_fingerprint(encoder) for encoder in self.encoders],
            "tokens": tokens.hexdigest(),
            "clip_skip": self.settings.clip_skip,
            "weighted_captions": self.settings.weighted_captions,
        }


def cache_captions(
    datasets: Sequence[ResolvedDataset],
    encode: CaptionEncoder,
    options: TextCacheOptions,
    *,
    memory_dtype: torch.dtype,
    share: WorkShare | None = None,
) -> tuple[TextStore, TextCachingReport]:
    """A store with the outputs of every text that the captions of the data sets can become.

    ``memory_dtype`` is the type of what is kept in memory. Archives that fit are used, the others are made anew; their
    making is dealt out over the processes, while each makes all that is kept in memory. Each caption of a group is
    encoded once, and again in float32 if its outputs are not finite. The encoders stay where they are.

    Raises UserError: outputs that are not finite even so, folders that cannot be written.
    """
    to_disk, share = options.cache_text_encoder_outputs_to_disk, share or WorkShare()
    store = TextStore(
        layout_of(encode.specs, encode.settings),
        encode.fingerprint() if to_disk else {},
        to_disk=to_disk,
        memory_dtype=memory_dtype,
        encode=lambda text: encode([text])[0],
    )
    targets = targets_of(datasets, options.cache_text_encoder_outputs_variants or 0, to_disk=to_disk)
    missing = [targets[index] for index in store.find(targets)]
    if to_disk:
        share.wait()  # nobody writes before all have looked
    notes = tuple(describe_notes(store.notes, "text encoder", "other text encoders or captions"))
    report = TextCachingReport(len(targets), len(targets) - len(missing), notes=notes)
    for note in notes if share.rank == 0 else ():
        logger.warning("%s", note)
    on_disk = _groups([target for target in missing if target.on_disk])
    in_memory = _groups([target for target in missing if not target.on_disk])
    problems = _encode_all([*on_disk[share.rank :: share.count], *in_memory], encode, store, report)
    lines = [f"{target.path}: the text encoders give no finite numbers for its caption" for target in problems]
    if to_disk:
        share.wait()
        left = [target for target in missing if target not in problems and not store.fetch(target)]
        lines += [f"{target.path}: its text encoder outputs could not be made" for target in left]
    if lines:
        raise UserError.of([*sorted(lines), "not even float32 helped: check the text encoders of the model"])
    by = " by this process" if share.count > 1 else ""
    counts = (report.total, report.reused, report.encoded)
    logger.info("text encoder outputs: %d entries, %d reused, %d captions encoded%s", *counts, by)
    return store, report


def _groups(targets: Sequence[TextTarget]) -> list[list[TextTarget]]:
    """Targets sorted by their texts and cut where a group has enough of them, so that equal texts come together."""
    groups: list[list[TextTarget]] = []
    texts: set[str] = set()
    for target in sorted(targets, key=lambda one: (one.texts, one.path)):
        if not groups or len(texts.union(target.texts)) > CAPTIONS_AT_ONCE:
            groups.append([])
            texts = set()
        groups[-1].append(target)
        texts.update(target.texts)
    return groups


def _encode_all(
    groups: Sequence[Sequence[TextTarget]], encode: CaptionEncoder, store: TextStore, report: TextCachingReport
) -> list[TextTarget]:
    """Encode and keep groups; returns the targets whose outputs are not finite even in float32."""
    if not groups:
        return []
    not_finite = _encode_groups(groups, encode, store, report, "caching text encoder outputs")
    if not not_finite:
        return []
    report.float32_retries += [target.path for target in not_finite]
    logger.warning(
        "text encoder outputs of %d captions were not finite and are made again in float32 (first: %s)",
        len(not_finite),
        not_finite[0].path,
    )
    with in_float32(encode.encoders):
        alone = [[target] for target in not_finite]
        return _encode_groups(alone, encode, store, report, "caching text encoder outputs in float32")


def _encode_groups(
    groups: Sequence[Sequence[TextTarget]],
    encode: CaptionEncoder,
    store: TextStore,
    report: TextCachingReport,
    description: str,
) -> list[TextTarget]:
    not_finite: list[TextTarget] = []
    with progress(sum(len(group) for group in groups), description) as bar:
        for group in groups:
            texts = list(dict.fromkeys(text for target in group for text in target.texts))
            outputs = dict(zip(texts, encode(texts), strict=True))
            report.encoded += len(texts)
            good = {text for text in texts if outputs[text].is_finite()}
            for target in group:
                if good.issuperset(target.texts):
                    store.put(target, [outputs[text] for text in target.texts])
                else:
                    not_finite.append(target)
            bar.advance(len(group))
    return not_finite


@contextmanager
def in_float32(modules: Sequence[nn.Module]) -> Generator[None]:
    """All floating point weights in float32 meanwhile; each gets its own type back, which loses nothing."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    former = [(tensor, tensor.dtype) for tensor in tensors if tensor.is_floating_point()]
    try:
        for tensor, _ in former:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in former:
            tensor.data = tensor.data.to(dtype)
