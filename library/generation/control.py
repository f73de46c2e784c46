"""ControlNet (L. Zhang and others, arXiv:2302.05543) and ControlNet-LLLite in generation.

Each net has its own picture. Several nets act together: what they add is summed. Jobs without guide pictures are drawn
without nets.

Shapes: B pictures, K copies for guidance, C channels, H W latent height and width.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.families.base import ControlResiduals, Geometry, ModelFamily, TextCondition
from library.generation.denoise import Extension, Setup
from library.generation.engine import Engine
from library.generation.guides import guide_pictures
from library.generation.preprocess import Preprocessor, make_preprocessor, unchanged
from library.log import UserError
from library.models.control import load_control
from library.models.load import Target
from library.models.memory import set_attention
from library.options.generation import ControlOptions, GenModelOptions, HighresOptions
from library.options.settings import Settings
from library.plugin import ControlAdapter, lllite_networks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Use:
    """How a net is used: its strength, and up to which share of the steps it acts."""

    multiplier: float = 1.0
    ratio: float = 1.0
    prepare: Preprocessor = unchanged

    def acts(self, share: float) -> bool:
        """False once this share of the steps is over the ratio."""
        return self.multiplier != 0 and self.ratio >= share


def check_control(options: ControlOptions) -> list[Use]:
    """How each net is used, without loading anything. Raises UserError for what cannot work."""
    nets, small = options.control_net_models or (), options.control_net_lllite_models or ()
    if nets and small:
        raise UserError("--control_net_models and --control_net_lllite_models cannot be used together; leave one out")
    for name in nets:
        _existing(name, "--control_net_models")
    for name in small:
        _existing(name, "--control_net_lllite_models")
    return uses_of(options, len(nets or small))


def attach_control(engine: Engine, settings: Settings) -> None:
    """Load the nets that the options name and let them take part in drawing. Raises UserError."""
    options = settings[ControlOptions]
    uses = check_control(options)
    if not uses:
        return
    only_first_stage = settings[HighresOptions].highres_fix_disable_control_net
    nets, small = options.control_net_models or (), options.control_net_lllite_models or ()
    target = Target(engine.settings.dtype, engine.settings.device)
    if small:
        files = [_existing(name, "--control_net_lllite_models") for name in small]
        adapters = [lllite_networks().load_lllite(file, engine.parts.unet) for file in files]
        for adapter in adapters:
            cast(nn.Module, adapter).to(target.device, target.dtype)
            adapter.attach()
        extension = LLLiteNets(adapters, uses)
    else:
        loaded = [_load(engine, name, target, settings[GenModelOptions]) for name in nets]
        extension = ControlNets(engine.family, loaded, uses)

    engine.extensions.append(when_guided(extension, only_first_stage))


def when_guided(net: Extension, only_first_stage: bool = False) -> Extension:
    """The net for jobs that name guide pictures; others are drawn without it, as is the second stage if asked for."""

    def extension(setup: Setup) -> AbstractContextManager[object]:
        is_wanted = bool(setup.batch[0].guides) and not (only_first_stage and setup.stage == 1)
        return net(setup) if is_wanted else nullcontext()

    return extension


def _load(engine: Engine, name: str, target: Target, options: GenModelOptions) -> nn.Module:
    """A net in the attention kind and memory layout of the U-Net."""
    parts = engine.parts
    net = load_control(_existing(name, "--control_net_models"), parts.spec.unet, target, parts.unet)
    set_attention(net, "xformers" if options.xformers or options.diffusers_xformers else "sdpa")
    if options.opt_channels_last:
        nn.Module.to(net, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return net


def _existing(name: str, option: str) -> Path:
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(f"{option} {name}: there is no such file or folder")
    return path


def uses_of(options: ControlOptions, count: int) -> list[Use]:
    """How each of ``count`` nets is used; what is not said is the usual. Raises UserError for more values than nets."""
    names = ("control_net_preps", "control_net_multipliers", "control_net_ratios")
    for name in names:
        given: Sequence[object] = getattr(options, name) or ()
        if len(given) > count:
            raise UserError(f"--{name}: {len(given)} values for {count} nets; give at most one for each")
    preps, multipliers, ratios = (list(getattr(options, name) or ()) for name in names)
    return [
        Use(
            multipliers[index] if index < len(multipliers) else 1.0,
            ratios[index] if index < len(ratios) else 1.0,
            make_preprocessor(preps[index]) if index < len(preps) else unchanged,
        )
        for index in range(count)
    ]


def share_done(setup: Setup, call: int) -> float:
    """The share of the model calls of a batch that were made before this one: 0 at the first."""
    total = len(setup.steps.timesteps) - setup.first_call
    return (call - setup.first_call) / max(1, total)


# ---- ControlNet


class ControlNets:
    """The extension for ControlNets. The block that reads the guide picture runs once per batch and latent size.

    The nets are as before when a batch is drawn, so they may go on learning.
    """

    def __init__(self, family: ModelFamily, nets: Sequence[nn.Module], uses: Sequence[Use]) -> None:
        self.family = family
        self.parts = [_divided(net, use) for net, use in zip(nets, uses, strict=True)]

    @contextmanager
    def __call__(self, setup: Setup) -> Generator[None]:
        guides = [guide_pictures(setup.batch, place, net.use.prepare) for place, net in enumerate(self.parts)]
        setup.unet.residuals = _Residuals(self, setup, guides)
        with ExitStack() as stack:
            for divided in self.parts:
                stack.enter_context(_taking_features(divided.net))
            try:
                yield
            finally:
                setup.unet.residuals = None


@dataclass(frozen=True)
class _DividedNet:
    """A ControlNet, and its block that reads the guide picture."""

    net: nn.Module
    hint: nn.Module
    use: Use
    takes_bgr: bool


def _divided(net: nn.Module, use: Use) -> _DividedNet:
    model = cast(Any, net)
    takes_bgr = model.config.controlnet_conditioning_channel_order == "bgr"
    return _DividedNet(net, model.controlnet_cond_embedding, use, takes_bgr)


@contextmanager
def _taking_features(net: nn.Module) -> Generator[None]:
    """The net takes, in place of guide pictures, what its block for them has made of them."""
    model = cast(Any, net)
    hint, order = model.controlnet_cond_embedding, model.config.controlnet_conditioning_channel_order
    model.controlnet_cond_embedding = nn.Identity()
    model.register_to_config(controlnet_conditioning_channel_order="rgb")  # or it would turn the features round
    try:
        yield
    finally:
        model.controlnet_cond_embedding = hint
        model.register_to_config(controlnet_conditioning_channel_order=order)


@dataclass
class _Residuals:
    """What the nets add in one batch. ``guides``: of each net (B, 3, height, width) in 0..1."""

    nets: ControlNets
    setup: Setup
    guides: Sequence[Tensor]
    _hints: dict[tuple[int, int, int], Tensor] = field(default_factory=dict[tuple[int, int, int], Tensor])

    def __call__(
        self, input_BCHW: Tensor, timesteps_B: Tensor, condition: TextCondition, geometry: Geometry, call: int
    ) -> ControlResiduals | None:
        share = share_done(self.setup, call)
        total: ControlResiduals | None = None
        for place, divided in enumerate(self.nets.parts):
            if not divided.use.acts(share):
                continue
            hint_BCHW = self._hint(place, input_BCHW)
            added = self.nets.family.predict_control(
                divided.net,
                input_BCHW,
                timesteps_B,
                condition,
                geometry,
                guide_BCHW=hint_BCHW.repeat(len(input_BCHW) // len(hint_BCHW), 1, 1, 1),
                strength=divided.use.multiplier,
            )
            total = added if total is None else total + added
        return total

    def _hint(self, place: int, input_BCHW: Tensor) -> Tensor:
        """Features of a guide picture (B, C, H, W) at the latents' size: they may grow while a picture is drawn."""
        height, width = input_BCHW.shape[-2:]
        key = (place, height, width)
        if key not in self._hints:
            divided, factor = self.nets.parts[place], self.nets.family.latent_factor
            guide_BCHW = self.guides[place]
            size = (height * factor, width * factor)
            if tuple(guide_BCHW.shape[-2:]) != size:
                guide_BCHW = F.interpolate(guide_BCHW, size, mode="bilinear", antialias=True)
            if divided.takes_bgr:
                guide_BCHW = guide_BCHW.flip(1)
            with torch.no_grad():
                self._hints[key] = divided.hint(guide_BCHW.to(input_BCHW))
        return self._hints[key]


# ---- ControlNet-LLLite


class LLLiteNets:
    """The extension for ControlNet-LLLite: each net has its own picture, all act together."""

    def __init__(self, nets: Sequence[ControlAdapter], uses: Sequence[Use]) -> None:
        self.nets, self.uses = nets, uses

    @contextmanager
    def __call__(self, setup: Setup) -> Generator[None]:
        inner = setup.predict

        def predict(latents_BCHW: Tensor, timestep: Tensor, call: int) -> Tensor:
            share = share_done(setup, call)
            for net, use in zip(self.nets, self.uses, strict=True):
                net.multiplier = use.multiplier if use.acts(share) else 0.0
            return inner(latents_BCHW, timestep, call)

        setup.predict = predict
        try:
            for place, (net, use) in enumerate(zip(self.nets, self.uses, strict=True)):
                net.set_condition(guide_pictures(setup.batch, place, use.prepare) * 2 - 1)
            yield
        finally:
            for net in self.nets:
                net.set_condition(None)
