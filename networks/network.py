"""A set of adapters over the layers of a model, with the plug-in protocol's methods. Knows no type by name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from library.log import UserError
from networks.adapter import Adapter
from networks.block_weights import BlockFactors
from networks.network_args import PlusRatios
from networks.strengths import PartStrengths
from networks.targets import Part, Target
from networks.weights import WeightTable, file_tensors, read_weights, to_weight_table, write_weights

logger = logging.getLogger(__name__)

LearningRates = float | Sequence[float | None] | None


@dataclass(frozen=True, eq=False)
class Placed:
    """An adapter and where it belongs."""

    target: Target
    adapter: Adapter


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What became of a file's modules. ``fresh`` adapters are not in the file and stay as created; ``left_out`` modules
    belong to a part of the model that is not adapted in this run."""

    source: str
    loaded: int
    fresh: tuple[str, ...] = ()
    left_out: int = 0

    def __str__(self) -> str:
        text = f"{self.loaded} layers read from {self.source}"
        if self.fresh:
            text += f", {len(self.fresh)} not in the file start new (first {self.fresh[0]})"
        if self.left_out:
            text += f", {self.left_out} of the part that is not trained left out"
        return text


def build_network(
    targets: Iterable[Target],
    make: Callable[[Target], Adapter | None],
    *,
    multiplier: float = 1.0,
    factors: BlockFactors | None = None,
    strengths: PartStrengths | None = None,
    plus: PlusRatios | None = None,
) -> AdapterNetwork:
    """The network of the adapters that ``make`` gives, called for the targets in their order."""
    made = ((target, make(target)) for target in targets)
    placed = [Placed(target, adapter) for target, adapter in made if adapter is not None]
    network = AdapterNetwork(placed, factors, strengths, plus)
    network.set_multiplier(multiplier)
    return network


class AdapterNetwork(nn.Module):
    """The network object that trainer and generators use.

    Adapters become children, and so are trained and saved, only when `apply_to` attaches them.
    """

    casts_itself = True  # right without autocast, whatever the types of layers and adapters are

    def __init__(
        self,
        placed: Sequence[Placed],
        factors: BlockFactors | None = None,
        strengths: PartStrengths | None = None,
        plus: PlusRatios | None = None,
    ) -> None:
        super().__init__()
        names = [entry.target.name for entry in placed]
        if len(set(names)) != len(names):
            raise ValueError("two layers have the same name in files")
        self._placed = tuple(placed)
        self._factors = factors
        self._strengths = strengths or PartStrengths()
        self._plus = plus or PlusRatios()
        self._frozen: frozenset[str] = frozenset()
        self._applied: tuple[Placed, ...] = ()

    # ---- what there is

    @property
    def may_skip_parameters(self) -> bool:
        """True if a step may leave some parameters without a gradient.

        Two text encoders: of the first only the next to last state is used, so its last layer gets none. (A dropped
        adapter has zero gradients, not none.)
        """
        return any(entry.target.encoder > 0 for entry in self._applied)

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The attached adapters, or all of them before `apply_to`."""
        return tuple(entry.adapter for entry in self._applied or self._placed)

    def count(self, part: Part) -> int:
        """Number of adapters in one part of the model, attached or not."""
        return sum(entry.target.part == part for entry in self._placed)

    @property
    def network_dim(self) -> str:
        """Rank of the layers without a spatial kernel, for metadata; ``Dynamic`` if they differ."""
        return common(entry.adapter.rank for entry in self._plain())

    @property
    def network_alpha(self) -> str:
        """Alpha of the same layers, for metadata; ``Dynamic`` if they differ."""
        return common(float(entry.adapter.alpha) for entry in self._plain())

    def _plain(self) -> list[Placed]:
        chosen = self._applied or self._placed
        return [entry for entry in chosen if not entry.target.is_spatial] or list(chosen)

    # ---- attaching

    def prepare_network(self, options: Any) -> None:
        """Refuse options of the trainer that these adapters cannot serve. Raises UserError."""
        if options.scale_weight_norms and not all(entry.adapter.can_scale() for entry in self._placed):
            raise UserError(f"--scale_weight_norms: {options.network_module} has no norm to limit; leave it out")

    def apply_to(self, text_encoder: Any, unet: Any, apply_text_encoder: bool = True, apply_unet: bool = True) -> None:
        """Attach the adapters of the chosen parts to the layers they were made for.

        Raises UserError if nothing is chosen, for example by block arguments that leave no layer.
        """
        if self._applied:
            raise RuntimeError("the network is applied already")
        wanted = {"text_encoder": apply_text_encoder, "unet": apply_unet}
        chosen = tuple(entry for entry in self._placed if wanted[entry.target.part])
        if not chosen:
            raise UserError("the network has no layer to train: check block_dims, *_lr_weight and the *_only options")
        for entry in chosen:
            entry.adapter.attach()
            self.add_module(entry.target.name, entry.adapter)
        self._applied = chosen
        text, total = sum(entry.target.part == "text_encoder" for entry in chosen), len(chosen)
        logger.info("network: %d layers of the text encoder, %d of the U-Net", text, total - text)

    def detach(self) -> None:
        """Undo `apply_to`; adapters keep their weights and may be applied again."""
        for entry in reversed(self._applied):
            entry.adapter.detach()
            delattr(self, entry.target.name)
        self._applied = ()

    def set_multiplier(self, multiplier: float) -> None:
        """Strength of all adapters from the next forward pass on; 1 is as trained."""
        for entry in self._placed:
            entry.adapter.multiplier = multiplier * self._strengths.of(entry.target)

    # ---- weights

    def load_weights(self, file: str) -> LoadReport:
        """Read a network file into the attached adapters.

        Raises UserError if the file lacks all of them, has layers that this network lacks, or other ranks.
        """
        table = self._named(read_weights(file))
        self._require_prefixes(table)
        report = self._load(table)
        if report.fresh:
            logger.warning("%s", report)
        return report

    def keep_known(self, table: WeightTable) -> WeightTable:
        """The modules of a file that an adapter of this network stands for; a warning says what is left out.

        Raises UserError if nothing is left.
        """
        known = {entry.target.name for entry in self._placed}
        kept = {name: tensors for name, tensors in table.modules.items() if name in known}
        left_out = [name for name in table.modules if name not in known]
        if not kept:
            raise UserError(
                f"{table.source}: none of its {len(left_out)} layers exists in this model, first {left_out[0]}; it was "
                "made for another base model"
            )
        if left_out:
            logger.warning(
                "%s: %d of its %d layers do not exist in this model and are left out, first %s",
                table.source,
                len(left_out),
                len(table.modules),
                left_out[0],
            )
        return replace(table, modules=kept)

    def require_known(self, table: WeightTable) -> None:
        """Raise UserError if a file has modules that no adapter of this network stands for."""
        known = {entry.target.name for entry in self._placed}
        parts = {entry.target.part for entry in self._placed}
        unknown = [
            name
            for name in table.modules
            # without text encoders at hand (generation may do so) their modules are nobody's
            if name not in known and ("text_encoder" in parts or not name.startswith("lora_te"))
        ]
        if unknown:
            raise UserError(
                f"{table.source}: {len(unknown)} of its {len(table.modules)} layers do not exist in this network, "
                f"first {unknown[0]}; it was made for another base model, or needs --dim_from_weights (or conv_dim)"
            )

    def _require_prefixes(self, table: WeightTable) -> None:
        """Tensors of the same names may mean something else to a type of another prefix."""
        for entry in self._placed:
            prefix = table.prefixes.get(entry.target.name, entry.adapter.prefix)
            if prefix != entry.adapter.prefix:
                raise UserError(
                    f"{table.source}: {entry.target.name} is of a related kind, which names it {prefix}_... and means "
                    "something else by the same tensors; --dim_from_weights takes the kind from the file"
                )

    def _named(self, table: WeightTable) -> WeightTable:
        return table.named_for(entry.target for entry in self._placed)

    def _load(self, table: WeightTable) -> LoadReport:
        self.require_known(table)
        chosen = self._applied or self._placed
        found = [entry for entry in chosen if entry.target.name in table.modules]
        if not found:
            raise UserError(f"{table.source} has no weights for any layer of this network")
        alpha = self.network_alpha
        problems = [text for entry in found for text in self._load_one(entry, table)]
        if problems:
            raise UserError(
                f"{table.source}: {len(problems)} layers do not fit, first {problems[0]}; "
                "--dim_from_weights takes kinds and ranks from the file"
            )
        if self.network_alpha != alpha:
            logger.warning("%s: its alpha %s replaces %s", table.source, self.network_alpha, alpha)
        fresh = tuple(entry.target.name for entry in chosen if entry.target.name not in table.modules)
        return LoadReport(table.source, len(found), fresh, len(table.modules) - len(found))

    @staticmethod
    def _load_one(entry: Placed, table: WeightTable) -> list[str]:
        tensors = table.modules[entry.target.name]
        if not entry.adapter.fits(tensors):
            wanted, found = ", ".join(entry.adapter.tensor_names), ", ".join(sorted(tensors))
            return [f"{entry.target.name} (a module of another kind: {found} where {wanted} belongs)"]
        try:
            entry.adapter.load_state_dict(dict(tensors))
        except RuntimeError:
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items() if tensor.dim())
            return [f"{entry.target.name} (rank {entry.adapter.rank} here; the file has {shapes})"]
        return []

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write the attached adapters, see `networks.weights.write_weights`."""
        modules = {entry.target.name: entry.adapter.state_dict() for entry in self._applied}
        prefixes = {entry.target.name: entry.adapter.prefix for entry in self._applied}
        write_weights(file, file_tensors(modules, prefixes), dtype, metadata)

    # ---- training

    def prepare_optimizer_params(
        self, text_encoder_lr: LearningRates = None, unet_lr: float | None = None, default_lr: float | None = None
    ) -> list[dict[str, Any]]:
        """Optimizer groups with ``params``, ``lr`` (absent: the optimizer's own) and the logged name ``lr_name``.

        One group a text encoder (one for all if the rate is a single number), then one for the U-Net, or one a block
        with block factors; with LoRA+ another one of each for the tensors that start at zero, with ``_plus`` in its
        name. What has rate 0 is frozen and left out.
        """
        self._check_text_rates(text_encoder_lr)
        members: dict[tuple[str, float | None], list[nn.Parameter]] = {}
        frozen: set[str] = set()
        for entry in self._applied:
            name = self._group_name(entry.target, text_encoder_lr)
            rate = self._rate(entry.target, text_encoder_lr, unet_lr, default_lr)
            if rate == 0 or (rate is None and default_lr == 0):
                frozen.add(entry.target.name)
                continue
            for group_name, group_rate, parameters in self._with_plus(entry, name, rate, default_lr):
                members.setdefault((group_name, group_rate), []).extend(parameters)
        groups: list[dict[str, Any]] = [
            {"params": parameters, **({} if rate is None else {"lr": rate}), "lr_name": name}
            for (name, rate), parameters in members.items()
        ]
        self._frozen = frozenset(frozen)
        self._set_gradients()
        return groups

    def _with_plus(
        self, entry: Placed, name: str, rate: float | None, default_lr: float | None
    ) -> Iterator[tuple[str, float | None, list[nn.Parameter]]]:
        """(name, rate, parameters) of the one or two groups that an adapter belongs to."""
        ratio = getattr(self._plus, entry.target.part)
        trained = entry.adapter.trained_parameters()
        if ratio == 1:
            yield name, rate, trained
            return
        base = default_lr if rate is None else rate
        if base is None:
            raise UserError("loraplus_* scale a learning rate: give --learning_rate, --unet_lr or --text_encoder_lr")
        faster = entry.adapter.plus_parameters()
        slower = [parameter for parameter in trained if all(parameter is not other for other in faster)]
        if slower:
            yield name, rate, slower
        if faster:
            yield f"{name}_plus", base * ratio, faster

    def _check_text_rates(self, rates: LearningRates) -> None:
        """One rate is for all text encoders, several must be as many as there are."""
        encoders = [entry.target.encoder for entry in self._placed if entry.target.part == "text_encoder"]
        count = max(encoders, default=-1) + 1
        if isinstance(rates, Sequence) and count and len(rates) not in (0, 1, count):
            there_are = "1 text encoder" if count == 1 else f"{count} text encoders"
            raise UserError(f"--text_encoder_lr: {len(rates)} rates for {there_are}")

    def _group_name(self, target: Target, text_encoder_lr: LearningRates) -> str:
        if target.part == "text_encoder":
            several = isinstance(text_encoder_lr, Sequence) and len(text_encoder_lr) > 1
            return f"textencoder{target.encoder + 1}" if several else "textencoder"
        return "unet" if self._factors is None else f"unet_block{target.block:02}"

    def _rate(
        self, target: Target, text_encoder_lr: LearningRates, unet_lr: float | None, default_lr: float | None
    ) -> float | None:
        if target.part == "text_encoder":
            if not isinstance(text_encoder_lr, Sequence):
                return text_encoder_lr
            return text_encoder_lr[min(target.encoder, len(text_encoder_lr) - 1)] if text_encoder_lr else None
        if self._factors is None:
            return unet_lr
        base = default_lr if unet_lr is None else unet_lr
        if base is None:
            raise UserError("*_lr_weight scale a learning rate by block: give --unet_lr or --learning_rate")
        return base * self._factors.of(target.block)

    def _set_gradients(self) -> None:
        for entry in self._applied:
            entry.adapter.requires_grad_(False)
            for parameter in entry.adapter.trained_parameters():
                parameter.requires_grad_(entry.target.name not in self._frozen)

    def prepare_grad_etc(self, text_encoder: Any, unet: Any) -> None:
        """Let all adapters learn but those whose rate is 0."""
        self._set_gradients()

    def on_epoch_start(self, text_encoder: Any, unet: Any) -> None:
        """Switch to train mode (dropouts act)."""
        self.train()

    def on_step_start(self, text_encoder: Any = None, unet: Any = None) -> None:
        """Before each forward pass: one draw says which adapters ``module_dropout`` leaves out of it."""
        for entry in self._applied if self.training else ():
            entry.adapter.on_step()
        rates = [entry.adapter.dropouts.module for entry in self._applied]
        if self.training and any(rates):
            draws = torch.rand(len(rates)).tolist()
            for entry, draw, rate in zip(self._applied, draws, rates, strict=True):
                entry.adapter.is_skipped = draw < rate

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to do: an adapter keeps only its small rank activations."""

    def get_trainable_params(self) -> list[nn.Parameter]:
        """The parameters that learn."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def delta_norms(self) -> dict[str, float]:
        """Frobenius norm of each adapter's weight change at multiplier 1, by its name."""
        return {adapter.name: float(adapter.delta_norm()) for adapter in self.adapters}

    @torch.no_grad()
    def apply_max_norm_regularization(self, max_norm: float, device: Any = None) -> tuple[int, float, float]:
        """Shrink every weight difference whose norm (at multiplier 1) exceeds ``max_norm`` to that norm.

        Returns (number shrunk, mean norm, largest norm) after it.
        """
        adapters = self.adapters
        norms = torch.stack([adapter.delta_norm().float() for adapter in adapters])
        ratios = (max_norm / norms.clamp(min=max_norm)).nan_to_num(nan=1.0)
        over = (ratios < 1).tolist()
        for adapter, ratio, is_over in zip(adapters, ratios, over, strict=True):
            if is_over:
                adapter.scale_delta_(ratio)
        scaled = norms * ratios
        return sum(over), float(scaled.mean()), float(scaled.max())

    # ---- merging

    def is_mergeable(self) -> bool:
        """True: every adapter is a weight difference."""
        return True

    def merge_to(
        self,
        text_encoder: Any,
        unet: Any,
        weights_sd: Mapping[str, Tensor] | None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Add ``weights_sd`` (None: the adapters' own weights) to the layers for good, in float32 on ``device``.

        Layers keep their own type, whatever ``dtype`` says: a parameter cannot change it in place.
        """
        if weights_sd is not None:
            self._load(self._named(to_weight_table(weights_sd, "the given weights")))
        for adapter in self.adapters:
            adapter.add_to_layer(device)
        logger.info("merged %d layers", len(self.adapters))

    def backup_weights(self) -> None:
        """Keep a copy of the weights of all adapted layers."""
        for adapter in self.adapters:
            adapter.backup()

    def restore_weights(self) -> None:
        """Put the copies of `backup_weights` back and let the adapters act in the forward pass again."""
        for adapter in self.adapters:
            adapter.unmerge()

    def pre_calculation(self) -> None:
        """Fold the adapters at their present multiplier into the layers and switch their forward part off.

        Call `backup_weights` of all networks first, and `restore_weights` of all before the next time.
        """
        for adapter in self.adapters:
            adapter.merge()


def common(values: Iterable[float]) -> str:
    """The rank or alpha that all layers have, as metadata say it; ``Dynamic`` if they differ."""
    found = set(values)
    return str(found.pop()) if len(found) == 1 else "Dynamic"
