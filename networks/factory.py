"""The two functions that a network module offers to trainers and generators, for any type of adapter."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from library.log import UserError
from networks.adapter import NO_DROPOUT, Adapter, AdapterSize, Dropouts
from networks.kinds import kind_of, require_whole, weight_norms
from networks.network import AdapterNetwork, build_network
from networks.network_args import NetworkArgs, PlusRatios, read_lora_args, truth
from networks.strengths import ARGUMENTS, PartStrengths, read_strengths
from networks.targets import Target, TextEncoders, block_layout, find_targets, outer_targets
from networks.weights import WeightTable, read_weights, to_weight_table

logger = logging.getLogger(__name__)

DEFAULT_RANK = 4


class NetworkFactory:
    """Makes networks of one type; ``variants`` are types that an argument such as ``dora_wd=True`` chooses instead.

    Subclasses may override `targets`, `sizes` and what follows them, and name further yes/no arguments in ``flags``.
    """

    flags: ClassVar[tuple[str, ...]] = ()

    def __init__(self, module: str, kind: type[Adapter], variants: Mapping[str, type[Adapter]] | None = None) -> None:
        self.module = module
        self.kind = kind
        self.variants = variants or {}

    def create_network(
        self,
        multiplier: float,
        network_dim: int | None,
        network_alpha: float | None,
        vae: nn.Module | None,
        text_encoder: TextEncoders,
        unet: nn.Module,
        neuron_dropout: float | None = None,
        **network_args: object,
    ) -> AdapterNetwork:
        """A new network, as the plug-in protocol has it. It changes nothing until it is applied and trained.

        ``network_dim`` absent: rank 4; ``network_alpha`` absent: 1, and 0: the rank. ``network_args``: see
        docs/networks.md. Raises UserError for arguments that cannot be.
        """
        args = self._read(network_args, unet)
        rank = network_dim or DEFAULT_RANK
        size_of = self.sizes(args, AdapterSize(rank, 1.0 if network_alpha is None else network_alpha))
        kind, dropouts = self._chosen(args), self.dropouts(args, neuron_dropout)
        targets = self.targets(text_encoder, unet, args)
        self.require_sizes({target: size for target in targets if (size := size_of(target))}, args)
        misplaced = [name for name in args.own if name not in kind.arguments]
        if misplaced:
            raise UserError(f"--network_args {misplaced[0]}: goes with {', '.join(self.variants)} only")

        def make(target: Target) -> Adapter | None:
            size = size_of(target)
            if size is None:
                return None
            adapter = kind(target.name, target.layer, size, multiplier, dropouts, **args.own)
            adapter.start()
            return adapter

        return build_network(targets, make, multiplier=multiplier, factors=args.block_factors, plus=args.plus_ratios)

    def create_network_from_weights(
        self,
        multiplier: float,
        file: str | None,
        vae: nn.Module | None,
        text_encoder: TextEncoders,
        unet: nn.Module,
        weights_sd: Mapping[str, Tensor] | None = None,
        for_inference: bool = False,
        neuron_dropout: float | None = None,
        **network_args: object,
    ) -> tuple[AdapterNetwork, dict[str, Tensor]]:
        """A network with the layers, types, ranks and alphas of a file (or of ``weights_sd``), and the file's tensors.

        The tensors are not loaded yet: `load_weights` after `apply_to`, or `merge_to`, does that. Dropouts and block
        learning-rate factors are taken from the arguments. Raises UserError if the file has layers that the model
        lacks; ``for_inference``: only if it has no other ones, and the arguments may say how strong it is in the
        model's parts.
        """
        strengths = PartStrengths()
        if for_inference:
            strengths = read_strengths(network_args, block_layout(unet), self.module)
            network_args = {key: value for key, value in network_args.items() if key not in ARGUMENTS}
        args = self._read(network_args, unet)
        if args.sizes_given():
            logger.warning("--network_args %s: the file decides ranks and alphas", ", ".join(args.sizes_given()))
        table = _table(file, weights_sd)
        targets = [*find_targets(text_encoder, unet, with_convolutions=True), *outer_targets(unet)]
        table = table.named_for(targets)
        kinds = require_whole(table, (self.kind, *self.variants.values()))
        dropouts = NO_DROPOUT if for_inference else self.dropouts(args, neuron_dropout)

        def make(target: Target) -> Adapter | None:
            tensors = table.modules.get(target.name)
            if tensors is None:
                return None
            adapter = kinds[target.name].for_tensors(target.name, target.layer, tensors, multiplier, dropouts)
            self.prepare_restored(adapter, args)
            return adapter

        network = build_network(
            targets,
            make,
            multiplier=multiplier,
            factors=args.block_factors,
            strengths=strengths,
            plus=args.plus_ratios,
        )
        if for_inference:
            table = network.keep_known(table)
        else:
            network.require_known(table)
        return network, table.flat()

    def reads(self, names: Collection[str]) -> bool:
        """True if modules with tensors of these names can be read, of whatever type of this package they are."""
        return kind_of(names, (self.kind, *self.variants.values())) is not None

    def inspect_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        """What each module changes, as `change_title` says, for the report at the end of training."""
        return weight_norms(tensors)

    def change_title(self) -> str:
        """What the numbers of `inspect_weights` are."""
        return "norm of the weight change"

    # ---- what a type may do otherwise

    def targets(self, text_encoder: TextEncoders, unet: nn.Module, args: NetworkArgs) -> Sequence[Target]:
        """The layers that a new network may adapt."""
        return find_targets(text_encoder, unet, args.with_convolutions)

    def sizes(self, args: NetworkArgs, plain: AdapterSize) -> Callable[[Target], AdapterSize | None]:
        """Rank and alpha of each layer of a new network; None leaves it out."""
        return _sizes_from_args(args, plain)

    def require_sizes(self, sizes: Mapping[Target, AdapterSize], args: NetworkArgs) -> None:
        """Raise UserError for sizes of a new network that cannot be."""

    def dropouts(self, args: NetworkArgs, neuron_dropout: float | None) -> Dropouts:
        """The dropouts of a network that is trained; ``neuron_dropout`` is ``--network_dropout``."""
        neuron = args.dropout if neuron_dropout is None else neuron_dropout
        dropouts = Dropouts(neuron or 0.0, args.rank_dropout or 0.0, args.module_dropout or 0.0)
        return NO_DROPOUT if dropouts == NO_DROPOUT else dropouts

    def prepare_restored(self, adapter: Adapter, args: NetworkArgs) -> None:
        """Give an adapter that was made for a file's tensors what only the arguments know."""

    # ---- arguments

    def _read(self, given: Mapping[str, object], unet: nn.Module) -> NetworkArgs:
        flags = dict.fromkeys((*self.variants, *self.flags), truth)
        kinds = (self.kind, *self.variants.values())
        own = {name: read for kind in kinds for name, read in kind.arguments.items()}
        args = read_lora_args(given, self.module, block_layout(unet), flags, own)
        if args.plus_ratios != PlusRatios() and not self._chosen(args).plus_names:
            raise UserError(f"--network_args loraplus_*: {self.module} has no tensors that start at zero; leave it out")
        return args

    def _chosen(self, args: NetworkArgs) -> type[Adapter]:
        chosen = [name for name in self.variants if name in args.flags]
        if len(chosen) > 1:
            raise UserError(f"--network_args {' and '.join(chosen)}: {self.module} has them one at a time")
        return self.variants[chosen[0]] if chosen else self.kind


def _table(file: str | None, weights_sd: Mapping[str, Tensor] | None) -> WeightTable:
    if weights_sd is not None:
        return to_weight_table(weights_sd, file or "the given weights")
    if file is None:
        raise UserError("a network from weights needs a file")
    return read_weights(file)


def _sizes_from_args(args: NetworkArgs, plain: AdapterSize) -> Callable[[Target], AdapterSize | None]:
    """Rank and alpha per layer: 3x3 convolutions take the ``conv_*`` arguments, U-Net layers their block's."""
    spatial_rank, spatial_alpha = args.conv_dim or 0, 1.0 if args.conv_alpha is None else args.conv_alpha
    factors = args.block_factors

    def size_of(target: Target) -> AdapterSize | None:
        block = target.block
        if target.is_spatial:
            ranks, alphas, rank, alpha = args.conv_block_dims, args.conv_block_alphas, spatial_rank, spatial_alpha
        else:
            ranks, alphas, rank, alpha = args.block_dims, args.block_alphas, plain.rank, plain.alpha
        if block is not None:
            if factors is not None and factors.of(block) == 0:
                return None
            rank = ranks[block] if ranks else rank
            alpha = alphas[block] if alphas else alpha
        return AdapterSize(rank, alpha) if rank else None

    return size_of
