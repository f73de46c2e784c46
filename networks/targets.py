"""Which layers of a model get an adapter, found by path, and what they are called in files.

Class names of the model libraries play no part. The set of layers that the model's structure promises is compared with
what is there, so a renamed or missing layer is an error and never a silently smaller network.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from library.log import UserError
from networks.block_weights import block_of

Part = Literal["text_encoder", "unet"]
TextEncoders = nn.Module | Sequence[nn.Module] | None

UNET_PREFIX = "lora_unet"
_TEXT_LAYER = re.compile(r"^(?:text_model\.)*encoder\.layers\.(\d+)$")
_TEXT_PARTS = (
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.q_proj",
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
)
_BLOCK = r"^(?:down_blocks\.\d+|up_blocks\.\d+|mid_block)"
_IN_BLOCK = re.compile(_BLOCK + r"\.")
_TRANSFORMER = re.compile(_BLOCK + r"\.attentions\.\d+$")
_TRANSFORMER_BLOCK = re.compile(_BLOCK + r"\.attentions\.\d+\.transformer_blocks\.\d+$")
_RESNET = re.compile(_BLOCK + r"\.resnets\.\d+$")
_SAMPLER = re.compile(_BLOCK + r"\.(?:down|up)samplers\.\d+$")
_TRANSFORMER_PARTS = ("proj_in", "proj_out")
_TRANSFORMER_BLOCK_PARTS = (
    *(f"{attention}.{part}" for attention in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    "ff.net.2",
)
_RESNET_PARTS = ("conv1", "conv2", "time_emb_proj")


@dataclass(frozen=True, eq=False)
class Target:
    """A layer that may get an adapter. ``block`` is the U-Net's block index 0..24, None in a text encoder."""

    name: str
    path: str
    layer: nn.Module
    part: Part
    encoder: int = 0
    block: int | None = None

    @property
    def is_spatial(self) -> bool:
        """True for a convolution with a kernel larger than 1x1."""
        return isinstance(self.layer, nn.Conv2d) and tuple(self.layer.kernel_size) != (1, 1)


def as_list(text_encoder: TextEncoders) -> list[nn.Module]:
    """The text encoders of a plug-in call: one model, several, or none."""
    if text_encoder is None:
        return []
    return [text_encoder] if isinstance(text_encoder, nn.Module) else list(text_encoder)


def text_encoder_prefixes(count: int) -> tuple[str, ...]:
    """Name prefixes in files: ``lora_te`` for a single encoder, ``lora_te1``, ``lora_te2`` for several."""
    return ("lora_te",) if count == 1 else tuple(f"lora_te{index + 1}" for index in range(count))


def text_encoder_name(prefix: str, path: str) -> str:
    """Name of a text encoder layer in files; it always has ``text_model``, whatever the path in memory begins with."""
    while path.startswith("text_model."):
        path = path.removeprefix("text_model.")
    return f"{prefix}_text_model_{path}".replace(".", "_")


def unet_name(path: str) -> str:
    """Name of a U-Net layer in files (SD1 and SD2: the Diffusers path with underscores)."""
    return f"{UNET_PREFIX}_{path}".replace(".", "_")


def text_encoder_targets(text_encoder: TextEncoders) -> list[Target]:
    """Attention projections and MLP layers of every encoder layer. Raises UserError if a layer lacks one of its six."""
    encoders = as_list(text_encoder)
    found: list[Target] = []
    for index, (encoder, prefix) in enumerate(zip(encoders, text_encoder_prefixes(len(encoders)), strict=True)):
        modules = dict(encoder.named_modules())
        expected = [f"{path}.{part}" for path in modules if _TEXT_LAYER.match(path) for part in _TEXT_PARTS]
        _require(expected, modules, f"text encoder {index + 1}")
        found += [
            Target(text_encoder_name(prefix, path), path, modules[path], "text_encoder", encoder=index)
            for path in expected
        ]
    return found


def unet_targets(unet: nn.Module, with_convolutions: bool) -> list[Target]:
    """The U-Net's layers in the order in which the model holds them.

    Without convolutions: everything inside the transformers. With: every weight of two or more dimensions inside the
    down, up and middle blocks (so also ResNets, their shortcuts and the samplers). Never the first and last convolution
    and the embedding layers. Raises UserError if the blocks hold other layers than their structure promises.
    """
    modules = dict(unet.named_modules())
    if "add_embedding.linear_1" in modules:
        raise UserError("this network module does not know the U-Net of SDXL yet; use an SD1 or SD2 model")
    expected = set(_expected_unet_paths(modules, with_convolutions))
    _require(sorted(expected), modules, "U-Net")
    layers = [path for path, module in modules.items() if _is_layer(module) and _IN_BLOCK.match(path)]
    present = [path for path in layers if with_convolutions or ".attentions." in path]
    unknown = [path for path in present if path not in expected]
    if unknown:
        raise UserError(f"the U-Net has {len(unknown)} layers that no adapter layout knows, first {unknown[0]}")
    return [Target(unet_name(path), path, modules[path], "unet", block=block_of(path)) for path in present]


def _expected_unet_paths(modules: Iterable[str], with_convolutions: bool) -> Iterable[str]:
    known = set(modules)
    for path in known:
        parts: tuple[str, ...] = ()
        if _TRANSFORMER.match(path):
            parts = _TRANSFORMER_PARTS
        elif _TRANSFORMER_BLOCK.match(path):
            parts = _TRANSFORMER_BLOCK_PARTS
        elif with_convolutions and _RESNET.match(path):
            shortcut = f"{path}.conv_shortcut" in known
            parts = (*_RESNET_PARTS, "conv_shortcut") if shortcut else _RESNET_PARTS
        elif with_convolutions and _SAMPLER.match(path):
            parts = ("conv",)
        yield from (f"{path}.{part}" for part in parts)


def _is_layer(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d)


def _require(expected: Sequence[str], modules: dict[str, nn.Module], what: str) -> None:
    if not expected:
        raise UserError(f"{what}: no layers found that an adapter could be attached to; is it another kind of model?")
    missing = [path for path in expected if not _is_layer(modules.get(path))]
    if missing:
        raise UserError(
            f"{what}: {len(missing)} of {len(expected)} layers that should get an adapter are missing, "
            f"first {missing[0]}; the installed diffusers or transformers may have renamed its layers"
        )
