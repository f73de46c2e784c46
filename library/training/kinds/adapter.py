"""Training of an additional network (LoRA and its relatives) on frozen models."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from library.checkpoint.inspection import check_network_file, low_rank_norms
from library.checkpoint.io import atomic_path
from library.families.base import ModelFamily, ModelParts
from library.log import UserError, first_line
from library.models.memory import store_in_fp8
from library.options import NetworkFileOptions, NetworkOptions, OptimizerOptions, PrecisionOptions
from library.options.settings import Settings
from library.options.values import split_pairs
from library.plugin import Network, NetworkModule, load_network_module, optional_method
from library.training.trainable import Artifact, Trainable

logger = logging.getLogger(__name__)


_PLUGIN_ERRORS = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


@contextlib.contextmanager
def _told(what: str) -> Generator[None]:
    """What a network module raises about a file or its arguments becomes one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _PLUGIN_ERRORS as error:
        raise UserError(f"{what} ({type(error).__name__}: {first_line(error)})") from error


def _missing_keys(report: object) -> list[str] | None:
    """The tensors that a file lacks, as ``load_weights`` of torch or of LyCORIS tells them; None if it does not."""
    if isinstance(report, Mapping):
        return list(cast(Mapping[str, Any], report).get("missing keys", ()))
    found = getattr(report, "missing_keys", None)
    return None if found is None else list(found)


class AdapterTraining(Trainable):
    """A network from ``--network_module``, attached to the views that the family offers to plug-ins."""

    def __init__(self, settings: Settings, family: ModelFamily, parts: ModelParts) -> None:
        options = settings[NetworkOptions]
        module_name = str(options.network_module)
        self._module: NetworkModule = load_network_module(module_name)
        self._options = options
        self._learning_rate = settings[OptimizerOptions].learning_rate
        views = family.adapter_views(parts)
        self._unet = views.unet
        self._text_encoder = views.text_encoder
        self._vae = parts.vae
        self.trains_unet = not options.network_train_text_encoder_only
        self.trains_text_encoder = not options.network_train_unet_only
        self._merge_base_weights()
        if settings[PrecisionOptions].fp8_base:
            for part in (*parts.text_encoders, parts.unet):
                store_in_fp8(part)
        network = self._create()
        prepare = optional_method(network, "prepare_network")
        if prepare:
            prepare(options)
        network.apply_to(self._text_encoder, self._unet, self.trains_text_encoder, self.trains_unet)
        if options.network_weights:
            self._load_weights(network, options.network_weights)
        network.prepare_grad_etc(self._text_encoder, self._unet)
        self._network = network
        self.module = cast(nn.Module, network)
        self._groups = self._prepare_groups()
        self._set_multiplier = optional_method(network, "set_multiplier")
        self._on_step_start = optional_method(network, "on_step_start")
        self._limit_norms = self._norm_limit()
        self._multiplier: float | None = None
        self.may_train_text = self.trains_text_encoder
        self.casts_itself = bool(getattr(network, "casts_itself", False))
        if settings[PrecisionOptions].fp8_base and not self.casts_itself:
            logger.warning(
                "--fp8_base: %s must not compute with the base weights themselves, which are float8 now; LyCORIS needs"
                " --network_args bypass_mode=True",
                module_name,
            )
        self.may_skip_parameters = bool(getattr(network, "may_skip_parameters", True))
        self.artifact = Artifact(
            suffix=f".{settings[NetworkFileOptions].save_model_as or 'safetensors'}", modelspec_kind="lora"
        )

    def _network_args(self) -> dict[str, Any]:
        return split_pairs(self._options.network_args, "network_args")

    def _create(self) -> Network:
        """A new network; what a plug-in raises about its arguments becomes one line."""
        module = f"--network_module {self._options.network_module}"
        with _told(f"{module} cannot make its network, check --network_args"):
            network = self._call_factory()
        if network is None:
            raise UserError(f"{module} made no network")
        return network

    def _load_weights(self, network: Network, file: str) -> None:
        """Begin with a file. Networks of other programs do not mind one that has nothing for them: it is refused."""
        module = f"--network_module {self._options.network_module}"
        with _told(f"--network_weights {file} does not fit {module}; --dim_from_weights takes ranks from the file"):
            report = network.load_weights(file)
        missing = _missing_keys(report)
        if missing is None:
            logger.info("network weights read from %s%s", file, f": {report}" if report else "")
            return
        count = len(cast(nn.Module, network).state_dict())
        if len(missing) >= count:
            raise UserError(f"--network_weights {file} has no weights for any layer of this network; what is it for?")
        logger.info("network weights read from %s", file)
        if missing:
            logger.warning(
                "%s lacks %d of %d tensors, which start new (first %s)", file, len(missing), count, missing[0]
            )

    def _call_factory(self) -> Network | None:
        options, args = self._options, self._network_args()
        if options.dim_from_weights:
            if not options.network_weights:
                raise UserError("--dim_from_weights needs --network_weights: the file whose ranks are taken")
            network, _ = self._module.create_network_from_weights(
                1.0,
                options.network_weights,
                self._vae,
                self._text_encoder,
                self._unet,
                neuron_dropout=options.network_dropout,
                **args,
            )
        else:
            if options.network_dropout is not None:
                args.setdefault("dropout", str(options.network_dropout))
            network = self._module.create_network(
                1.0,
                options.network_dim,
                options.network_alpha,
                self._vae,
                self._text_encoder,
                self._unet,
                neuron_dropout=options.network_dropout,
                **args,
            )
        return network

    def _merge_base_weights(self) -> None:
        if next(self._unet.parameters()).device.type == "meta":
            return  # a plan: there are no weights to merge into
        files = self._options.base_weights or []
        multipliers = [*(self._options.base_weights_multiplier or []), *[1.0] * len(files)]
        for file, multiplier in zip(files, multipliers, strict=False):
            dtype, device = next(self._unet.parameters()).dtype, next(self._unet.parameters()).device
            with _told(f"--base_weights {file} cannot be merged by --network_module {self._options.network_module}"):
                network, weights = self._module.create_network_from_weights(
                    multiplier, file, self._vae, self._text_encoder, self._unet, for_inference=True
                )
                network.merge_to(self._text_encoder, self._unet, weights, dtype, device)
            logger.info("merged into the base model: %s at %g", file, multiplier)

    def _prepare_groups(self) -> list[dict[str, Any]]:
        """Groups of the network; networks of an older form of the protocol take two rates, not three."""
        options = self._options
        text_rates = options.text_encoder_lr or [None]
        text_lr = text_rates if len(text_rates) > 1 else text_rates[0]
        prepare: Callable[..., Any] = self._network.prepare_optimizer_params
        rates: list[Any] = [text_lr, options.unet_lr, self._learning_rate]
        count = _positional_count(prepare)
        groups: Any = prepare(*rates[:count])
        if isinstance(groups, tuple):  # newer third-party networks return (groups, descriptions)
            groups, names = groups
            for group, name in zip(groups, names, strict=False):
                group.setdefault("lr_name", str(name))
        groups = [{**group, "params": _leaves(group["params"])} for group in groups]
        groups = [group for group in groups if group["params"] and group.get("lr", self._learning_rate) != 0]
        if not groups:
            raise UserError("nothing to train: every learning rate is 0 or the network has no modules")
        kept = {id(parameter) for group in groups for parameter in group["params"]}
        for parameter in self.module.parameters():
            parameter.requires_grad_(id(parameter) in kept)
        return groups

    def _norm_limit(self) -> Callable[[], dict[str, float]] | None:
        limit = self._options.scale_weight_norms
        if not limit:
            return None
        method = optional_method(self.module, "apply_max_norm_regularization")
        if method is None:
            raise UserError(
                f"--scale_weight_norms: {self._options.network_module} cannot limit its norms; leave it out"
            )
        names = ("max_norm/keys_scaled", "max_norm/average_key_norm", "max_norm/max_key_norm")

        def shrink() -> dict[str, float]:
            results = method(limit, next(self.module.parameters()).device)
            return {name: float(value) for name, value in zip(names, results, strict=True)}

        return shrink

    def parameter_groups(self) -> list[dict[str, Any]]:
        return self._groups

    def on_epoch_start(self) -> None:
        self._network.on_epoch_start(self._text_encoder, self._unet)

    def why_no_multiplier(self) -> str | None:
        return None if self._set_multiplier else f"{self._options.network_module} has no multiplier"

    def on_micro_batch(self, network_multiplier: float) -> None:
        super().on_micro_batch(network_multiplier)
        if network_multiplier != self._multiplier:
            if self._set_multiplier:
                self._set_multiplier(network_multiplier)
            self._multiplier = network_multiplier
        if self._on_step_start:
            self._on_step_start(self._text_encoder, self._unet)

    def enable_gradient_checkpointing(self) -> None:
        self._network.enable_gradient_checkpointing()

    def after_update(self) -> dict[str, float]:
        return self._limit_norms() if self._limit_norms else {}

    def save(self, path: str, dtype: torch.dtype | None, metadata: dict[str, str], counters: Mapping[str, int]) -> None:
        with atomic_path(path) as temporary:  # third-party networks write in place
            self._network.save_weights(str(temporary), dtype, metadata)

    def check(self, path: Path) -> list[str]:
        found = check_network_file(path, self._inspect)
        title = optional_method(self._module, "change_title")
        return (replace(found, title=title()) if title else found).lines()

    def _inspect(self, tensors: Mapping[str, Tensor]) -> Mapping[str, float]:
        """What each module of the written file changes; where its tensors do not tell, as the layers here know it."""
        found = (optional_method(self._module, "inspect_weights") or low_rank_norms)(tensors)
        live = optional_method(self._network, "delta_norms")
        if live is None or {key.partition(".")[0] for key in tensors} <= found.keys():
            return found
        return {**live(), **found}

    def recorded_options(self) -> dict[str, Any]:
        if not self._options.network_weights:
            return {}
        names = ("network_dim", "network_alpha")
        return {name: value for name in names if (value := getattr(self.module, name, None)) is not None}


def _positional_count(function: Callable[..., Any]) -> int:
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return 3
    return min(3, sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters))


def _leaves(parameters: Any) -> list[nn.Parameter]:
    return [parameters] if isinstance(parameters, nn.Parameter) else list(parameters)
