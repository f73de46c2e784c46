"""Key table of SDXL files. U-Net, VAE and text encoders have the same rows as SD1 and SD2, below other prefixes."""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import replace

from library.checkpoint.keymap import KeyMap, Operation, Row
from library.checkpoint.sd_keys import UNET_PREFIX, VAE_PREFIX, text_rows, unet_rows, vae_rows
from library.models.spec import ArchitectureSpec

TEXT_PREFIXES = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
"""In the order of the text encoders."""

MARKERS = ("v_pred", "ztsnr")
"""Tensors without meaning in themselves: the model predicts velocity, was trained with zero terminal SNR."""

LOGIT_SCALE = TEXT_PREFIXES[1] + "logit_scale"
_PROJECTION = TEXT_PREFIXES[1] + "text_projection"

# Keys that are known and not needed: averaged copies, schedule tables, markers, leftovers of training.
_IGNORABLE = (
    r"^model_ema\.",
    r"position_ids$",
    rf"^({'|'.join(MARKERS)})$",
    r"^(betas|logvar|scale_factor|global_step|epoch|edm_vpred\.\w+|denoiser\.(sigmas|log_sigmas))$",
    r"^(alphas|sqrt|log_one_minus|posterior)\w*$",
    r"^first_stage_model\.(loss|model_ema)\.",
    r"^conditioner\.embedders\.0\.(logit_scale|transformer\.(text_projection\.weight|logit_scale))$",
    r"^conditioner\.embedders\.1\.model\.(logit_scale|attn_mask)$",
    r"^conditioner\.embedders\.1\.model\.visual\.",
)


def key_map(spec: ArchitectureSpec, present: Container[str] = ()) -> KeyMap:
    """The table of an SDXL model of any width, for writing, or for a file with the keys ``present``.

    OpenCLIP multiplies the pooled state by its projection from the right, a linear layer by the transpose of its
    weight, so the projection is transposed both ways. Files that name it ``text_projection.weight`` hold the linear
    layer's weight as it is.
    """
    first, second = TEXT_PREFIXES
    rows = [Row(UNET_PREFIX + name, "unet", key, how) for name, key, how in unet_rows(spec.unet)]
    for part, prefix, text in zip(spec.text_parts, (first, second), spec.text_encoders, strict=True):
        rows += [Row(prefix + name, part, key, how) for name, key, how in text_rows(text)]
    rows += [Row(VAE_PREFIX + name, "vae", key, how) for name, key, how in vae_rows(spec.vae)]
    if _PROJECTION + ".weight" in present:
        rows = [
            replace(row, file_key=_PROJECTION + ".weight", operation=Operation.COPY)
            if row.file_key == _PROJECTION
            else row
            for row in rows
        ]
    return KeyMap(tuple(rows), (UNET_PREFIX, first, second, VAE_PREFIX), re.compile("|".join(_IGNORABLE)))


_BLOCK = re.compile(r"(?P<part>time_embed|label_emb|input_blocks|middle_block|output_blocks|out)\.(?P<number>\d+)\.")
_FIRST_OF = {"input_blocks": 1, "middle_block": 10, "output_blocks": 13}
"""Where the blocks of a part begin in the count of 23: embeddings 0, input 1-9, middle 10-12, output 13-21, out 22."""


def parameter_blocks(spec: ArchitectureSpec) -> dict[str, int]:
    """The block, 0 to 22, of each parameter of the U-Net by its Diffusers name."""
    found: dict[str, int] = {}
    for name, key, _ in unet_rows(spec.unet):
        match = _BLOCK.match(name)
        assert match is not None, name
        first = _FIRST_OF.get(match["part"])
        found[key] = (22 if match["part"] == "out" else 0) if first is None else first + int(match["number"])
    return found
