"""The protocol between trainer, generator and network modules (LoRA and others, built in or third-party).

They import ``--network_module`` by name and use only this surface, so ``library`` never imports ``networks``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor, nn

from library.log import UserError


class NetworkModule(Protocol):
    """Functions that a network module offers at top level; the second is needed for ranks or base weights of files."""

    def create_network(
        self,
        multiplier: float,
        network_dim: int | None,
        network_alpha: float | None,
        vae: nn.Module,
        text_encoder: nn.Module | list[nn.Module],
        unet: nn.Module,
        neuron_dropout: float | None = None,
        **network_args: Any,
    ) -> Network | None: ...

    def create_network_from_weights(
        self,
        multiplier: float,
        file: str | None,
        vae: nn.Module,
        text_encoder: nn.Module | list[nn.Module],
        unet: nn.Module,
        weights_sd: dict[str, Tensor] | None = None,
        for_inference: bool = False,
        **network_args: Any,
    ) -> tuple[Any, dict[str, Tensor]]: ...


class Network(Protocol):
    """What every network has; what only some have is asked for with `optional_method`."""

    def apply_to(
        self, text_encoder: Any, unet: nn.Module, apply_text_encoder: bool = True, apply_unet: bool = True
    ) -> None: ...

    def load_weights(self, file: str) -> Any: ...

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None, unet_lr: float | None, default_lr: float | None
    ) -> list[dict[str, Any]]: ...

    def prepare_grad_etc(self, text_encoder: Any, unet: nn.Module) -> None: ...

    def on_epoch_start(self, text_encoder: Any, unet: nn.Module) -> None: ...

    def enable_gradient_checkpointing(self) -> None: ...

    def get_trainable_params(self) -> Any: ...

    def save_weights(self, file: str, dtype: Any, metadata: dict[str, str] | None) -> None: ...


class ControlAdapter(Protocol):
    """A small network that changes what layers of the U-Net get, after a picture (ControlNet-LLLite)."""

    multiplier: float  # 0: it does nothing

    def attach(self) -> None: ...

    def set_condition(self, images_BCHW: Tensor | None) -> None: ...


class LLLiteWidths(Protocol):
    """Widths of what is made of the picture, and inside the network."""

    cond_width: int
    inner_width: int


class LLLiteNetwork(ControlAdapter, Protocol):
    """A ControlNet-LLLite network; also an nn.Module."""

    recomputes: bool  # gradient checkpointing of what is made of the pictures

    @property
    def size(self) -> LLLiteWidths: ...


class LLLiteNetworks(Protocol):
    """What the module of ControlNet-LLLite networks offers at top level."""

    def load_lllite(self, path: Path, unet: nn.Module) -> LLLiteNetwork:
        """The network of a file, made for a U-Net, frozen, not yet attached. Raises UserError."""
        ...

    def create_lllite(
        self,
        unet: nn.Module,
        cond_width: int | None = None,
        inner_width: int | None = None,
        dropout: float | None = None,
        weights: str | None = None,
    ) -> LLLiteNetwork:
        """A network to be trained, not yet attached; ``weights`` is a file to start from. Raises UserError."""
        ...

    def inspect_weights(self, tensors: Mapping[str, Tensor]) -> Mapping[str, float]:
        """How much each network of a file does, by its name: 0 if it changes nothing."""
        ...


def lllite_networks() -> LLLiteNetworks:
    """The module of ControlNet-LLLite networks."""
    return cast(LLLiteNetworks, importlib.import_module("networks.lllite"))


def load_network_module(name: str) -> Any:
    """Import a network module by its dotted name.

    Raises UserError with one line if it is missing, or lacks ``create_network``.
    """
    if name.startswith("."):
        raise UserError(f"--network_module {name}: must be the whole name, package.module")
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if error.name and name.startswith(error.name):
            raise UserError(
                f"--network_module: there is no module {name}; install its package or fix the name"
            ) from error
        raise UserError(f"--network_module {name}: it needs the package {error.name!r}; install it") from error
    if not callable(getattr(module, "create_network", None)):
        raise UserError(f"--network_module {name}: the module has no create_network function, it is no network module")
    return module


def optional_method(network: Any, name: str) -> Callable[..., Any] | None:
    """A method that the protocol leaves optional, or None; this is the one place that asks for it."""
    method = getattr(network, name, None)
    return method if callable(method) else None
