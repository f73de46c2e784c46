"""Networks (LoRA and others) in generation: merged for good, folded in and taken out again, or beside the layers.

Each ``--network_weights`` is one network. ``networks.lora`` reads all that it knows, whatever type the file's modules
are of; other files of LyCORIS go to LyCORIS, and ``--network_module`` may say something else.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from library.checkpoint.io import read_header
from library.families.base import AdapterViews
from library.generation.engine import Engine
from library.generation.regions import Regions, attach_regions
from library.log import UserError, is_out_of_memory
from library.options.generation import GenNetworkOptions, PictureOptions
from library.options.settings import Settings
from library.options.values import argument_list
from library.plugin import load_network_module, optional_method

logger = logging.getLogger(__name__)

PLAIN_LORA = "networks.lora"
LYCORIS = "lycoris.kohya"
_FACTORY_ERRORS = (AssertionError, AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class NetworkRequest:
    """What the options say of one network."""

    file: str
    module: str
    multiplier: float
    arguments: Mapping[str, str]


@dataclass(frozen=True)
class LiveNetwork:
    """A network that is not merged, and its strength where a picture says nothing else."""

    file: str
    network: Any
    multiplier: float


def attach_networks(engine: Engine, settings: Settings) -> tuple[LiveNetwork, ...]:
    """Load the networks of the options into the engine's model; returns those that are not merged, in their order.

    `Engine.set_multipliers` takes one strength for each of these. With ``--mask_path`` they can be kept to regions.
    Raises UserError.
    """
    options, has_masks = settings[GenNetworkOptions], settings[PictureOptions].mask_path is not None
    requests = read_requests(options)
    regions = attach_regions(engine, options.network_regional_mask_max_color_codes) if has_masks else None
    to_merge = len(requests) if options.network_merge else options.network_merge_n_models or 0
    if to_merge > len(requests):
        raise UserError(f"--network_merge_n_models {to_merge}: there are only {len(requests)} --network_weights")
    if not requests:
        return ()
    folded = options.network_pre_calc and not has_masks
    if options.network_pre_calc and has_masks:
        logger.warning("--network_pre_calc does nothing with --mask_path: regions need the networks beside the layers")
    views = engine.family.adapter_views(engine.parts)
    live: list[LiveNetwork] = []
    for index, request in enumerate(requests):
        if options.network_show_meta:
            _show_metadata(request.file)
        network, weights = _create(engine, views, request)
        if index < to_merge and _can_be_merged(network, request):
            device = engine.settings.device
            with _told_of_sizes(request.file):
                network.merge_to(views.text_encoder, views.unet, weights, engine.settings.dtype, device)
            logger.info("%s is merged into the model at %g", request.file, request.multiplier)
            continue
        _put_beside(engine, views, network, weights, request, None if regions is None else (regions, len(live)))
        live.append(LiveNetwork(request.file, network, request.multiplier))
        detach = optional_method(network, "detach")
        if folded and detach is not None and _can_be_folded(live[-1]):
            detach()  # its weights are in the layers' own then: nothing is left to do in a step
    if live:
        engine.set_multipliers = Strengths(live, folded)
    return tuple(live)


# ---- what is asked for


def read_requests(options: GenNetworkOptions) -> list[NetworkRequest]:
    """One request for each file of ``--network_weights``. Raises UserError where the lists do not fit each other."""
    files, modules = options.network_weights or [], options.network_module
    for name in ("network_module", "network_mul", "network_args"):
        count = len(getattr(options, name) or ())
        if count > len(files) or (name == "network_module" and modules is not None and count != len(files)):
            sizes = f"{_number(count, 'value')} for {_number(len(files), 'file')}"
            raise UserError(f"--{name} has {sizes} of --network_weights")
    multipliers = [*(options.network_mul or ()), *[1.0] * len(files)]
    arguments = [argument_list(line, "network_args") for line in options.network_args or ()]
    arguments += [{}] * (len(files) - len(arguments))
    found = [_module_of(file, modules[index] if modules else None) for index, file in enumerate(files)]
    return [NetworkRequest(*values) for values in zip(files, found, multipliers[: len(files)], arguments, strict=True)]


def _number(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _module_of(file: str, asked: str | None) -> str:
    """The module that reads a file: as asked for, or by the names of its tensors."""
    if not Path(file).is_file():
        raise UserError(f"--network_weights {file}: there is no such file")
    if asked is not None:
        return asked
    infos, _ = read_header(file)
    modules: dict[str, set[str]] = {}
    for key in infos:
        if key.startswith("lora_"):
            module, _, name = key.partition(".")
            modules.setdefault(module, set()).add(name)
    reads = load_network_module(PLAIN_LORA).reads
    return PLAIN_LORA if all(reads(names) for names in modules.values()) else LYCORIS


def _show_metadata(file: str) -> None:
    _, metadata = read_header(file)
    logger.info("metadata of %s: %s", file, json.dumps(metadata, ensure_ascii=False, indent=2, sort_keys=True))


# ---- putting it in


def _create(engine: Engine, views: AdapterViews, request: NetworkRequest) -> tuple[Any, dict[str, Tensor]]:
    """The network and its tensors; what a module raises about the file or the arguments becomes one line."""
    module = load_network_module(request.module)
    factory = optional_method(module, "create_network_from_weights")
    if factory is None:
        raise UserError(f"--network_module {request.module} cannot be used to draw: it reads no files")
    try:
        network, weights = factory(
            request.multiplier,
            request.file,
            engine.parts.vae,
            views.text_encoder,
            views.unet,
            for_inference=True,
            **request.arguments,
        )
    except _FACTORY_ERRORS as error:
        raise UserError(
            f"--network_weights {request.file}: {request.module} cannot make its network of it, check --network_module "
            f"and --network_args ({type(error).__name__}: {error})"
        ) from error
    if network is None:
        raise UserError(f"--network_weights {request.file}: {request.module} made no network of it")
    return network, weights


def _can_be_merged(network: Any, request: NetworkRequest) -> bool:
    """Whether it can be added to the weights for good at its strength; says why if not."""
    asked = optional_method(network, "is_mergeable")
    if asked is None or optional_method(network, "merge_to") is None or not asked():
        logger.warning("%s: %s cannot merge it; it stays beside the layers", request.file, request.module)
        return False
    if request.multiplier != 1.0 and request.module == LYCORIS:
        logger.warning("%s: %s merges at strength 1 only; it stays beside the layers", request.file, request.module)
        return False
    return True


def _put_beside(
    engine: Engine,
    views: AdapterViews,
    network: Any,
    weights: Mapping[str, Tensor],
    request: NetworkRequest,
    region: tuple[Regions, int] | None,
) -> None:
    """Let the network act in the layers' forward passes, in their type and on their device."""
    if region is None:
        network.apply_to(views.text_encoder, views.unet, True, True)
    else:
        regions, index = region
        with regions.watch(index, request.file):
            network.apply_to(views.text_encoder, views.unet, True, True)
    with _told_of_sizes(request.file):
        result = network.load_state_dict(dict(weights), strict=False)
    _require_match(weights, result.unexpected_keys, request.file)
    for parameter in network.parameters():
        parameter.data = parameter.data.to(engine.settings.device, engine.settings.dtype)
    network.to(engine.settings.device)  # buffers such as alpha keep their type: half precision would round them
    network.requires_grad_(False).eval()


@contextmanager
def _told_of_sizes(file: str) -> Generator[None]:
    """Names of layers are the same in SD 1.x and 2.x: that a file is of the other one shows in the sizes only."""
    try:
        yield
    except (RuntimeError, UserError) as error:  # torch's own error names every tensor on a line of its own
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{file}: its layers are of other sizes than this model's; it was made for another one"
        ) from error


def _require_match(weights: Mapping[str, Tensor], unexpected: Sequence[str], file: str) -> None:
    """Networks of other programs drop what the model lacks without a word."""
    layers, lost = ({key.partition(".")[0] for key in keys} for keys in (weights, unexpected))
    if lost >= layers:
        raise UserError(f"{file}: none of its {len(layers)} layers exists in this model; it was made for another one")
    if lost:
        logger.warning("%s: %d of its %d layers do not exist in this model", file, len(lost), len(layers))


class Strengths:
    """Gives the networks their strengths. ``folded``: into the layers' weights, so that a step costs nothing more."""

    def __init__(self, live: Sequence[LiveNetwork], folded: bool) -> None:
        self._live = live
        self._now: tuple[float, ...] | None = None
        self._setters = [_setter(entry) for entry in live]
        self._folded = [entry for entry in live if folded and _can_be_folded(entry)]
        for entry in live if folded else ():
            if entry not in self._folded:
                logger.warning("--network_pre_calc: %s stays beside the layers, its module cannot do it", entry.file)
        for entry in self._folded:
            entry.network.backup_weights()

    def __call__(self, multipliers: Sequence[float]) -> None:
        """Nothing is done if they are the present ones. Raises UserError if they are not one for each network."""
        wanted = tuple(multipliers)
        if wanted == self._now:
            return
        if len(wanted) != len(self._live):
            raise UserError(f"{len(wanted)} strengths for {len(self._live)} networks; give the same --network_weights")
        for entry in reversed(self._folded):
            entry.network.restore_weights()
        for set_multiplier, multiplier in zip(self._setters, wanted, strict=True):
            set_multiplier(multiplier)
        for entry in self._folded:
            entry.network.pre_calculation()
        self._now = wanted


def _setter(entry: LiveNetwork) -> Callable[[float], Any]:
    method = optional_method(entry.network, "set_multiplier")
    if method is not None:
        return method

    def refuse(multiplier: float) -> None:
        if multiplier != entry.multiplier:
            raise UserError(f"{entry.file}: its network module knows no strengths; leave out --am and --network_mul")

    return refuse


def _can_be_folded(entry: LiveNetwork) -> bool:
    names = ("backup_weights", "restore_weights", "pre_calculation")
    return all(optional_method(entry.network, name) is not None for name in names)
