"""Make the modules of an architecture, empty on the meta device, and fill them tensor by tensor.

Peak memory is the module in its target type plus one tensor of the file: nothing is initialised and no state dict is
held.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from library.models.spec import BOS_ID, EOS_ID, TextEncoderSpec, UNetSpec, VaeSpec

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel

ModuleT = TypeVar("ModuleT", bound=nn.Module)
TEXT_ROOT = "text_model."


# those of torch.nn.init that a mode is asked about
_FIRST_VALUES = frozenset({nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_, nn.init.constant_})


class _NoFirstValues(TorchFunctionMode):
    """Skips what torch.nn.init would draw: on the meta device that is half of the time that making a U-Net takes."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _FIRST_VALUES:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def without_values() -> Generator[None]:
    """Modules made here are on the meta device and are given no first values."""
    with torch.device("meta"), _NoFirstValues():
        yield


class _GroupNorm(nn.GroupNorm):
    """torch's group norm, also of groups that hold one value: nn.functional refuses these, group_norm gives the bias.

    A batch of one small picture has them where the lowest level of the U-Net is a single cell.
    """

    def forward(self, input: Tensor) -> Tensor:
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def take_any_size(module: nn.Module) -> None:
    """Let the group norms of a U-Net or ControlNet take groups of one value."""
    for child in module.modules():
        if type(child) is nn.GroupNorm:
            child.__class__ = _GroupNorm


def unet_config(spec: UNetSpec) -> dict[str, Any]:
    """The diffusers configuration of a U-Net."""
    last = len(spec.widths) - 1
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in spec.depths]
    up = ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(spec.depths)]
    per_level = [depth or 1 for depth in spec.depths]
    per_level[last] = spec.mid_depth  # diffusers takes the middle block's depth from the last level
    vector = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": spec.size_width,
        "projection_class_embeddings_input_dim": spec.vector_width,
    }
    return {
        "sample_size": spec.sample_size,
        "in_channels": spec.in_channels,
        "out_channels": spec.out_channels,
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        "block_out_channels": spec.widths,
        "layers_per_block": spec.layers_per_level,
        "transformer_layers_per_block": 1 if set(per_level) == {1} else tuple(per_level),
        "cross_attention_dim": spec.context_width,
        # this entry really holds the number of heads
        "attention_head_dim": spec.heads[0] if len(set(spec.heads)) == 1 else spec.heads,
        "use_linear_projection": spec.linear_projection,
        "upcast_attention": spec.upcast_attention,
        "norm_num_groups": 32,
        **({} if spec.vector_width is None else vector),
    }


def vae_config(spec: VaeSpec) -> dict[str, Any]:
    """The diffusers configuration of a VAE."""
    levels = len(spec.widths)
    return {
        "sample_size": 256,
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": spec.widths,
        "latent_channels": spec.latent_channels,
        "layers_per_block": spec.layers_per_level,
        "norm_num_groups": spec.norm_groups,
        "scaling_factor": spec.scaling_factor,
        "force_upcast": spec.force_upcast,
    }


def text_config(spec: TextEncoderSpec) -> dict[str, Any]:
    """The transformers configuration of a text encoder."""
    return {
        "vocab_size": spec.vocabulary,
        "hidden_size": spec.width,
        "intermediate_size": spec.mlp_width,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "max_position_embeddings": spec.positions,
        "hidden_act": spec.activation,
        "layer_norm_eps": 1e-5,
        "projection_dim": spec.projection_width or spec.width,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": 1,
    }


def empty_unet(spec: UNetSpec) -> UNet2DConditionModel:
    """A U-Net without weights, on the meta device, with torch's scaled dot product attention."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor2_0

    with without_values():
        unet = UNet2DConditionModel(**unet_config(spec))
    take_any_size(unet)
    unet.set_attn_processor(AttnProcessor2_0())
    return unet


def empty_vae(spec: VaeSpec) -> AutoencoderKL:
    """A VAE without weights, on the meta device."""
    from diffusers import AutoencoderKL
    from diffusers.models.attention_processor import AttnProcessor2_0

    with without_values():
        vae = AutoencoderKL(**vae_config(spec))
    vae.set_attn_processor(AttnProcessor2_0())
    return vae


def empty_text_encoder(spec: TextEncoderSpec) -> nn.Module:
    """A CLIP text encoder without weights, on the meta device; with a projection layer if the spec has one."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(**text_config(spec))
    with without_values():
        return CLIPTextModel(config) if spec.projection_width is None else CLIPTextModelWithProjection(config)


def memory_names(module: nn.Module) -> dict[str, str]:
    """Canonical key (as in a Diffusers folder) -> key in the module's own state dict.

    transformers 5 dropped the level ``text_model.`` in memory; files have it.
    """
    keys = module.state_dict().keys()
    if type(module).__name__.startswith("CLIPTextModel"):
        return {canonical_text_key(key): key for key in keys}
    return {key: key for key in keys}


def canonical_text_key(key: str) -> str:
    """A text encoder's key with the level ``text_model.`` that files have."""
    return key if key.startswith((TEXT_ROOT, "text_projection.")) else TEXT_ROOT + key


def canonical_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's tensors by canonical key: what is written to files."""
    state = module.state_dict()
    return {canonical: state[key] for canonical, key in memory_names(module).items()}


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Canonical key -> shape; works on the meta device."""
    return {key: tuple(tensor.shape) for key, tensor in canonical_state(module).items()}


def fill(
    module: ModuleT, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, device: torch.device | str
) -> ModuleT:
    """Give an empty module memory of ``dtype`` on ``device``, then copy (canonical key, tensor) pairs into it.

    The module comes back in eval mode and frozen. Raises ValueError if a tensor stayed unfilled.
    """
    names = memory_names(module)
    nn.Module.to(module, dtype)  # the plain one: diffusers' own warns about a list that is empty
    module.to_empty(device=device)
    state = module.state_dict()
    missing = set(names)
    with torch.no_grad():
        for key, tensor in tensors:
            state[names[key]].copy_(tensor)
            missing.discard(key)
    if missing:
        raise ValueError(f"not filled: {', '.join(sorted(missing))}")
    _fill_buffers(module, set(names.values()))
    return module.eval().requires_grad_(False)


def _fill_buffers(module: nn.Module, stored: set[str]) -> None:
    """Buffers that no file holds: CLIP's position numbers."""
    for name, buffer in module.named_buffers():
        if name in stored:
            continue
        if not name.endswith("position_ids"):
            raise ValueError(f"no rule to fill the buffer {name}")
        buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
