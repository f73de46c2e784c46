"""Optimizers by name: which class, which arguments, and what each family of them needs to be told.

Not here: learning rates over time (lr.py) and the saving of optimizer states (state.py).
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import logging
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import torch

from library.log import UserError, first_line, nearest

if TYPE_CHECKING:
    from library.options import OptimizerOptions

logger = logging.getLogger(__name__)

Groups = list[dict[str, Any]]
_FUSED_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How a named optimizer is made: its class, the package that has it, and the arguments that its name stands for."""

    path: str
    package: str = "torch"
    fixed: Mapping[str, Any] = field(default_factory=dict[str, Any])
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    check: Callable[[_Request], None] | None = None


@dataclass(slots=True)
class _Request:
    """One optimizer to be made; checks may change ``learning_rate`` and ``arguments``."""

    options: OptimizerOptions
    name: str
    groups: Groups
    learning_rate: float | None
    arguments: dict[str, Any]
    device: torch.device
    loss_scaling: bool


# ---- public


def create_optimizer(
    options: OptimizerOptions, groups: Iterable[Any], device: torch.device, *, loss_scaling: bool = False
) -> tuple[torch.optim.Optimizer, str]:
    """Make the optimizer that the options name, and the text that the metadata record of it.

    ``groups``: parameter groups (dictionaries with ``params``, optionally ``lr`` and ``lr_name``) or plain parameters.
    ``loss_scaling``: a gradient scaler will drive the steps (fp16). The recorded text is ``module.Class`` and, in
    parentheses, the arguments. Raises UserError for an unknown name, a missing package, or arguments that the class
    refuses.
    """
    name = _requested_name(options)
    recipe = _find_recipe(name)
    arguments = {**recipe.defaults, **parse_arguments(options.optimizer_args or [], "optimizer_args")}
    if "lr" in arguments:
        raise UserError("--optimizer_args: lr is not set here; use --learning_rate (or --unet_lr, --text_encoder_lr)")
    request = _Request(options, name, _as_groups(groups), options.learning_rate, arguments, device, loss_scaling)
    if recipe.check:
        recipe.check(request)
    optimizer_class = _load_class(recipe, name)
    optimizer = _construct(optimizer_class, recipe, request)
    if recipe.package == "bitsandbytes":
        _try_on_device(optimizer_class, recipe, request)
    OptimizerMode(optimizer).train()
    return optimizer, _recorded_name(optimizer_class, request.arguments)


def parse_arguments(items: Iterable[str], option: str) -> dict[str, Any]:
    """Read ``key=value`` items whose values are Python literals; split at the first equals sign.

    Raises one UserError that names every bad item.
    """
    result: dict[str, Any] = {}
    problems: list[str] = []
    for item in items:
        key, equals, text = item.partition("=")
        key = key.strip()
        if not equals or not key.isidentifier():
            problems.append(f"{item!r} is not of the form key=value")
            continue
        if key in result:
            problems.append(f"{key} is given twice")
        try:
            result[key] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError):
            problems.append(f"{item!r}: the value is no Python literal{_literal_hint(text.strip())}")
    if problems:
        raise UserError(f"--{option}: " + "; ".join(problems))
    return result


def uses_relative_step(optimizer: torch.optim.Optimizer) -> bool:
    """True if the optimizer (Adafactor) makes its own learning rate from the step number, so that no schedule
    applies.
    """
    return bool(optimizer.param_groups[0].get("relative_step")) and optimizer.param_groups[0].get("lr") is None


def is_schedule_free(optimizer: torch.optim.Optimizer) -> bool:
    """True if the optimizer keeps separate weights for training and for use (schedule-free methods)."""
    return isinstance(optimizer, _SwitchesModes)


@runtime_checkable
class _SwitchesModes(Protocol):
    def train(self) -> None: ...

    def eval(self) -> None: ...


class OptimizerMode:
    """Switches optimizers that train one set of weights and use another (schedule-free); does nothing for all
    others.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._switch = optimizer if isinstance(optimizer, _SwitchesModes) else None

    @property
    def averages(self) -> bool:
        """True if what is used is an average that the optimizer keeps itself."""
        return self._switch is not None

    def train(self) -> None:
        """Put the weights in place that gradients are taken at."""
        if self._switch is not None:
            self._switch.train()

    def eval(self) -> None:
        """Put the weights in place that are saved and used."""
        if self._switch is not None:
            self._switch.eval()

    @contextlib.contextmanager
    def evaluating(self) -> Generator[None]:
        """Weights for use inside the block, and exactly the former training weights after it.

        Switching there and back rounds, so a run that saved more often would differ; the copy prevents that.
        """
        if self._switch is None:
            yield
            return
        former = [p.detach().clone() for p in self._parameters]
        self._switch.eval()
        try:
            yield
        finally:
            self._switch.train()
            with torch.no_grad():
                for parameter, value in zip(self._parameters, former, strict=True):
                    parameter.copy_(value)


# ---- checks of single families


def _check_adamw(request: _Request) -> None:
    chosen = {"fused", "foreach", "capturable", "differentiable"} & request.arguments.keys()
    # With a gradient scaler the fused step decides alone whether it is skipped, and the schedule would not learn of it.
    if chosen or request.loss_scaling or request.device.type not in _FUSED_DEVICES:
        return
    if all(p.is_floating_point() for group in request.groups for p in group["params"]):
        request.arguments["fused"] = True


def _check_adaptive(request: _Request) -> None:
    """D-Adaptation and Prodigy find the rate by themselves; ``lr`` is only a factor on it, and must be the same for
    all.
    """
    rates = [request.options.learning_rate if group.get("lr") is None else group["lr"] for group in request.groups]
    distinct = sorted({rate for rate in rates if rate != 0})
    if len(distinct) > 1:
        raise UserError(
            f"--optimizer_type {request.name} takes one learning rate for all parts, but there are {distinct}; give"
            " --learning_rate, --unet_lr and --text_encoder_lr the same value (about 1.0), or 0 to freeze a part,"
            " and leave out factors of rates such as loraplus_* and *_lr_weight"
        )
    if distinct and distinct[0] <= 0.1:
        logger.warning(
            "%s finds the learning rate by itself and multiplies it with yours: %s is very low, about 1.0 is usual",
            request.name,
            distinct[0],
        )


def _check_adafactor(request: _Request) -> None:
    arguments = request.arguments
    arguments.setdefault("relative_step", True)
    if not arguments["relative_step"] and arguments.get("warmup_init"):
        logger.warning("Adafactor: warmup_init needs relative_step, which is therefore switched on")
        arguments["relative_step"] = True
    if not arguments["relative_step"]:
        if request.options.max_grad_norm != 0:
            logger.warning("Adafactor limits its updates by itself: --max_grad_norm 0 is recommended with it")
        if arguments.get("clip_threshold", 1.0) != 1.0:
            logger.warning("Adafactor: clip_threshold=1.0 is recommended")
        return
    if any("lr" in group for group in request.groups):
        logger.warning(
            "Adafactor with relative_step makes its own rate: --unet_lr, --text_encoder_lr and factors of rates such as"
            " loraplus_* and *_lr_weight have no effect"
        )
    elif request.learning_rate:
        logger.warning("Adafactor with relative_step makes its own rate: --learning_rate has no effect")
    request.groups = [{key: value for key, value in group.items() if key != "lr"} for group in request.groups]
    request.learning_rate = None


# ---- the table

_BITSANDBYTES = [
    "AdamW8bit",
    "Lion8bit",
    "PagedAdamW8bit",
    "PagedLion8bit",
    "PagedAdamW",
    "PagedAdamW32bit",
    "Adam8bit",
    "PagedAdam8bit",
    "AdEMAMix8bit",
    "PagedAdEMAMix8bit",
    "Adagrad8bit",
    "RMSprop8bit",
    "LAMB8bit",
    "LARS8bit",
    "SGD8bit",
]
_DADAPTATION = {
    "DAdaptation": "dadaptation.experimental.DAdaptAdamPreprint",
    "DAdaptAdamPreprint": "dadaptation.experimental.DAdaptAdamPreprint",
    "DAdaptAdanIP": "dadaptation.experimental.DAdaptAdanIP",
    "DAdaptAdaGrad": "dadaptation.DAdaptAdaGrad",
    "DAdaptAdam": "dadaptation.DAdaptAdam",
    "DAdaptAdan": "dadaptation.DAdaptAdan",
    "DAdaptLion": "dadaptation.DAdaptLion",
    "DAdaptSGD": "dadaptation.DAdaptSGD",
}
_NESTEROV: Mapping[str, Any] = {"nesterov": True}
_MOMENTUM: Mapping[str, Any] = {"momentum": 0.9}
_RECIPES: Mapping[str, _Recipe] = {
    "AdamW": _Recipe("torch.optim.AdamW", check=_check_adamw),
    "SGDNesterov": _Recipe("torch.optim.SGD", fixed=_NESTEROV, defaults=_MOMENTUM),
    "SGDNesterov8bit": _Recipe("bitsandbytes.optim.SGD8bit", "bitsandbytes", _NESTEROV, _MOMENTUM),
    "Muon": _Recipe("library.training.muon.Muon"),  # torch's own takes matrices only, so no convolution
    "Lion": _Recipe("lion_pytorch.Lion", "lion-pytorch"),
    "Prodigy": _Recipe("prodigyopt.Prodigy", "prodigyopt", check=_check_adaptive),
    "AdaFactor": _Recipe("transformers.optimization.Adafactor", "transformers", check=_check_adafactor),
    "AdamWScheduleFree": _Recipe("schedulefree.AdamWScheduleFree", "schedulefree"),
    "RAdamScheduleFree": _Recipe("schedulefree.RAdamScheduleFree", "schedulefree"),
    "SGDScheduleFree": _Recipe("schedulefree.SGDScheduleFree", "schedulefree"),
    "CAME": _Recipe("pytorch_optimizer.CAME", "pytorch-optimizer"),
    **{name: _Recipe(f"bitsandbytes.optim.{name}", "bitsandbytes") for name in _BITSANDBYTES},
    **{name: _Recipe(path, "dadaptation", check=_check_adaptive) for name, path in _DADAPTATION.items()},
}


# ---- from a name to a class


def _requested_name(options: OptimizerOptions) -> str:
    given = [name for name in (options.optimizer_type,) if name]
    given += ["AdamW8bit"] if options.use_8bit_adam else []
    given += ["Lion"] if options.use_lion_optimizer else []
    if len(given) > 1:
        raise UserError(
            "--optimizer_type, --use_8bit_adam and --use_lion_optimizer each name an optimizer; give one of them"
        )
    return given[0] if given else "AdamW"


def _find_recipe(name: str) -> _Recipe:
    known = {known_name.lower(): recipe for known_name, recipe in _RECIPES.items()}
    if name.lower() in known:
        return known[name.lower()]
    if "." in name.strip("."):
        return _Recipe(name, name.split(".")[0])
    own = {torch_name.lower(): torch_name for torch_name in _torch_optimizers()}
    if name.lower() in own:
        return _Recipe(f"torch.optim.{own[name.lower()]}")
    hint = nearest(name, (*own.values(), *_RECIPES)) or f"; known names: {', '.join(sorted(_RECIPES))}"
    raise UserError(f"--optimizer_type {name}: there is no such optimizer{hint}; or give package.module.Class")


def _torch_optimizers() -> list[str]:
    base = torch.optim.Optimizer
    classes = {name: value for name, value in vars(torch.optim).items() if inspect.isclass(value)}
    return [name for name, value in classes.items() if issubclass(value, base) and value is not base]


def _load_class(recipe: _Recipe, name: str) -> type[torch.optim.Optimizer]:
    module_name, _, class_name = recipe.path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not module_name.startswith(error.name):
            raise UserError(
                f"--optimizer_type {name}: {module_name} needs the package {error.name}, which is missing"
            ) from error
        raise UserError(f"--optimizer_type {name}: {_missing(recipe)}") from error
    except (ImportError, OSError, RuntimeError) as error:  # a native library that does not fit this machine
        raise UserError(
            f"--optimizer_type {name}: {recipe.package} is installed but cannot be loaded here ({first_line(error)})"
        ) from error
    found = getattr(module, class_name, None)
    if found is None:
        hint = nearest(class_name, dir(module)) or "; a newer version of the package may have it"
        raise UserError(f"--optimizer_type {name}: {module_name} has no {class_name}{hint}")
    if not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)):
        raise UserError(f"--optimizer_type {name}: {recipe.path} is not an optimizer class")
    return found


def _missing(recipe: _Recipe) -> str:
    if any(recipe.path == known.path for known in _RECIPES.values()):
        return f"the package {recipe.package} is not installed; run: pip install {recipe.package}"
    return f"there is no module {recipe.path.rpartition('.')[0]}; install its package or fix the name"


def _try_on_device(cls: type[torch.optim.Optimizer], recipe: _Recipe, request: _Request) -> None:
    """One step on a throw-away tensor: native kernels fail in many ways, and better now than after caching."""
    name, device = request.name, request.device
    weight = torch.nn.Parameter(torch.zeros(4096, device=device))  # the smallest size that gets 8-bit states
    weight.grad = torch.ones_like(weight)
    try:
        make = cast("Callable[..., torch.optim.Optimizer]", cls)
        make([weight], lr=1e-3, **{**recipe.fixed, **request.arguments}).step()
    except Exception as error:  # whatever it is, the optimizer does not work here
        raise UserError(
            f"--optimizer_type {name}: {recipe.package} does not work on this device, {device.type}"
            f" ({first_line(error)}); use {'Lion' if 'Lion' in name else 'AdamW'} instead"
        ) from error


def _construct(cls: type[torch.optim.Optimizer], recipe: _Recipe, request: _Request) -> torch.optim.Optimizer:
    make = cast("Callable[..., torch.optim.Optimizer]", cls)
    accepted = inspect.signature(cls).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values())
    unknown = [] if takes_any else [key for key in request.arguments if key not in accepted]
    if unknown:
        allowed = ", ".join(key for key in accepted if key not in ("self", "params", "lr"))
        raise UserError(f"--optimizer_args: {request.name} has no argument {', '.join(unknown)}; it has {allowed}")
    try:
        return make(request.groups, lr=request.learning_rate, **{**recipe.fixed, **request.arguments})
    except (TypeError, ValueError, AssertionError, RuntimeError, LookupError, ArithmeticError) as error:
        raise UserError(f"--optimizer_type {request.name} refuses its arguments: {first_line(error)}") from error


def _as_groups(groups: Iterable[Any]) -> Groups:
    items = list(groups)
    if items and not isinstance(items[0], dict):
        items = [{"params": items}]
    result: Groups = [{**group, "params": list(group["params"])} for group in items]
    result = [group for group in result if group["params"]]
    if not result:
        raise UserError("there is nothing to train: no parameters (are all learning rates 0?)")
    return result


def _recorded_name(cls: type[torch.optim.Optimizer], arguments: Mapping[str, Any]) -> str:
    # "fused" is how AdamW is computed here, not which AdamW it is
    listed = ",".join(f"{key}={value}" for key, value in arguments.items() if key != "fused")
    return f"{cls.__module__}.{cls.__name__}" + (f"({listed})" if listed else "")


def _literal_hint(text: str) -> str:
    if text.lower() in ("true", "false", "none"):
        return f" (write {text.capitalize()})"
    return " (text needs quotes inside)" if text.replace("_", "").isalpha() else ""
