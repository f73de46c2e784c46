"""Which tokens a network's text encoder part changes most: a hint at the words that it was trained with."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from library.device import choose_device
from library.log import UserError, progress
from library.models import load
from library.models.spec import BOS_ID, EOS_ID
from library.options.network_tools import InterrogatorOptions
from library.text.encode import encode_rows
from library.text.tokenizer import clip_tokenizer
from networks.adapter import Adapter
from networks.kinds import adapter_of, read_network
from networks.targets import text_encoder_targets

logger = logging.getLogger(__name__)

SHOWN = 100
SDXL_LAYER = 2  # from the end, without the final norm


@dataclass(frozen=True)
class Encoders:
    """Text encoders with a network's adapters attached, and which of their layers the model uses."""

    modules: Sequence[nn.Module]
    adapters: Sequence[Adapter]
    layer: int | None
    final_norm: bool

    def states(self, ids_RT: Tensor, with_network: bool) -> list[Tensor]:
        """The states (R, T, D) of each encoder, in float32."""
        for adapter in self.adapters:
            adapter.enabled = with_network
        return [encode_rows(module, ids_RT, self.layer, self.final_norm).float() for module in self.modules]


@torch.no_grad()
def differences(encoders: Encoders, tokens: int, batch_size: int, device: torch.device | str = "cpu") -> Tensor:
    """For each token alone in a caption, the mean absolute change of the states over all encoders: (tokens,)."""
    found: list[Tensor] = []
    starts = range(0, tokens, batch_size)
    for start in progress(starts, f"comparing tokens, {batch_size} at a time"):
        ids_R = torch.arange(start, min(start + batch_size, tokens), device=device)
        ids_RT = torch.stack([torch.full_like(ids_R, BOS_ID), ids_R, torch.full_like(ids_R, EOS_ID)], dim=1)
        plain, changed = (encoders.states(ids_RT, with_network) for with_network in (False, True))
        change_RD = torch.cat([(b - a).abs().mean(dim=1) for a, b in zip(plain, changed, strict=True)], dim=1)
        found.append(change_RD.mean(dim=1).cpu())
    return torch.cat(found)


def load_encoders(model: Path, network: str, clip_skip: int | None, device: torch.device) -> Encoders:
    """The text encoders of a model with a network on them. Raises UserError if the network has nothing for them."""
    recognised = load.recognise(model)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    target = load.Target(dtype, device)
    parts = load.load_parts(model, recognised.spec, dict.fromkeys(recognised.spec.text_parts, target))
    modules = [parts[name] for name in recognised.spec.text_parts]
    is_sdxl = recognised.spec.family == "sdxl"
    targets = text_encoder_targets(modules)
    table = read_network(network)[0].named_for(targets)
    own = {name: tensors for name, tensors in table.modules.items() if name.startswith("lora_te")}
    if not own:
        raise UserError(f"{network} has no weights for text encoders: its words cannot be told from it")
    layers = {one.name: one.layer for one in targets}
    unknown = [name for name in own if name not in layers]
    if unknown:
        raise UserError(
            f"{network}: {len(unknown)} of its {len(own)} text encoder layers do not exist in {model}, first "
            f"{unknown[0]}; it was made for another base model"
        )
    adapters = [adapter_of(name, tensors, layer=layers[name]).to(device) for name, tensors in own.items()]
    for adapter in adapters:
        adapter.attach()
    layer = clip_skip or (SDXL_LAYER if is_sdxl else None)
    return Encoders(modules, adapters, layer, final_norm=not is_sdxl)


def interrogate(options: InterrogatorOptions) -> list[tuple[int, str, float]]:
    """Print the tokens that change most, (id, text, change) each. Raises UserError."""
    device = choose_device()
    encoders = load_encoders(Path(str(options.sd_model)), str(options.model), options.clip_skip, device)
    tokenizer = clip_tokenizer()
    change = differences(encoders, EOS_ID + 1, options.batch_size, device)
    values, ids = change.sort(descending=True, stable=True)
    rows = [
        (int(token), str(tokenizer.decode([int(token)])), float(value))
        for token, value in zip(ids[:SHOWN], values[:SHOWN], strict=True)
    ]
    for rank, (token, text, value) in enumerate(rows, 1):
        print(f"[{rank}]: {token} {text}: {value:.6g}")
    return rows
