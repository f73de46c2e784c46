# ruff: noqa: RUF009 - option() declares a field
"""Options of the loop, the optimizer, its schedule, the noise and the loss."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from library.options.base import OptionGroup, option
from library.options.values import steps_or_share


@dataclass(frozen=True, kw_only=True)
class LoopOptions(OptionGroup):
    """How long, how reproducible, on how many processes."""

    title: ClassVar[str] = "Training loop"

    max_train_steps: int = option(1600, ge=1, help="number of optimizer steps")
    max_train_epochs: int | None = option(None, ge=1, help="number of epochs; decides the number of steps when given")
    gradient_accumulation_steps: int = option(1, ge=1, help="batches that make one optimizer step")
    seed: int | None = option(None, ge=0, lt=2**32, help="seed of every random draw; chosen and recorded when absent")
    on_nan: Literal["stop", "skip"] = option(
        "stop", help="what to do when loss or gradient is not finite: stop the run, or skip the step"
    )
    dry_run: bool = option(False, help="print the plan of the run (images, steps, rates, files, disk) and stop")
    ddp_timeout: int | None = option(None, ge=1, help="minutes that processes wait for one another", metavar="MINUTES")
    ddp_gradient_as_bucket_view: bool = option(False, help="DistributedDataParallel's gradient_as_bucket_view")
    ddp_static_graph: bool = option(False, help="DistributedDataParallel's static_graph")


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(OptionGroup):
    """The optimizer and its base learning rate."""

    title: ClassVar[str] = "Optimizer"

    optimizer_type: str = option("", help="optimizer name, or dotted path of a class; AdamW when empty", metavar="NAME")
    use_8bit_adam: bool = option(False, help="old form of optimizer_type AdamW8bit")
    use_lion_optimizer: bool = option(False, help="old form of optimizer_type Lion")
    learning_rate: float = option(
        2.0e-6, ge=0, help="learning rate of parts without a rate of their own; 0 freezes them"
    )
    max_grad_norm: float = option(1.0, ge=0, help="gradients are scaled down to this norm; 0 leaves them")
    optimizer_args: list[str] | None = option(
        None, pairs="word", help="arguments of the optimizer as Python literals: weight_decay=0.01 betas=.9,.999"
    )


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions(OptionGroup):
    """How the learning rate changes."""

    title: ClassVar[str] = "Learning rate schedule"

    lr_scheduler: str = option("constant", help="name of a built-in schedule", metavar="NAME")
    lr_scheduler_type: str = option(
        "", help="schedule class of torch, or dotted path of one; wins over lr_scheduler", metavar="CLASS"
    )
    lr_scheduler_args: list[str] | None = option(
        None, pairs="word", help="arguments of the schedule as Python literals: T_max=100"
    )
    lr_warmup_steps: int | float = option(
        0,
        convert=steps_or_share,
        help="warm-up in optimizer steps, or as a share of all steps (0.1 or 10%)",
        metavar="N",
    )
    lr_scheduler_num_cycles: int = option(1, ge=1, help="number of restarts of cosine_with_restarts")
    lr_scheduler_power: float = option(1, ge=0, help="exponent of polynomial")


@dataclass(frozen=True, kw_only=True)
class NoiseOptions(OptionGroup):
    """Noise and timesteps."""

    title: ClassVar[str] = "Noise and timesteps"

    noise_offset: float | None = option(None, ge=0, help="strength of a constant added to each channel of the noise")
    noise_offset_random_strength: bool = option(
        False, help="draw the strength of noise_offset anew for each sample, uniformly between 0 and its value"
    )
    adaptive_noise_scale: float | None = option(
        None, help="the latent's channel means times this are added to noise_offset"
    )
    multires_noise_iterations: int | None = option(None, ge=0, help="levels of coarser noise added to the noise")
    multires_noise_discount: float = option(0.3, ge=0, help="factor from one level of coarser noise to the next")
    ip_noise_gamma: float | None = option(
        None, ge=0, help="strength of extra noise on the model's input that the target does not hold"
    )
    ip_noise_gamma_random_strength: bool = option(
        False, help="draw the strength of ip_noise_gamma anew for each sample, uniformly between 0 and its value"
    )
    min_timestep: int | None = option(None, ge=0, le=999, help="lowest timestep drawn; 0 when absent")
    max_timestep: int | None = option(None, ge=1, le=1000, help="timesteps stay below this; 1000 when absent")
    zero_terminal_snr: bool = option(False, help="change the noise schedule so that its last step is pure noise")


@dataclass(frozen=True, kw_only=True)
class ValidationOptions(OptionGroup):
    """The loss on images that are not trained on."""

    title: ClassVar[str] = "Validation"

    validation_split: float = option(
        0.0, ge=0, lt=1, help="share of each subset's images that are never trained on and give the validation loss"
    )
    validation_seed: int = option(
        0, ge=0, lt=2**32, help="seed of the choice of these images and of their noise; does not depend on seed"
    )
    validate_every_n_steps: int | None = option(None, ge=1, help="validate after every N-th optimizer step")
    validate_every_n_epochs: int | None = option(
        None, ge=1, help="validate after every N-th epoch; after each one when no interval is given"
    )
    max_validation_steps: int | None = option(
        None, ge=1, help="measure only N batches of the held-out images, always the same; all when absent"
    )


@dataclass(frozen=True, kw_only=True)
class EmaOptions(OptionGroup):
    """An average of the trained weights, saved beside them."""

    title: ClassVar[str] = "Average of the weights (EMA)"

    ema_decay: float | None = option(
        None,
        ge=0,
        lt=1,
        help="keep an exponential moving average of the trained weights, in float32 (4 bytes for each number that"
        " learns), and save it beside each model, with -ema in its name; 0.999 to 0.9999 is usual, 0 is off",
    )
    ema_device: Literal["cpu"] | None = option(
        None, help="where the average is kept: cpu saves the device's memory and costs a copy of the weights each step"
    )
    sample_with_ema: bool = option(False, help="draw previews with the average; needs ema_decay")


@dataclass(frozen=True, kw_only=True)
class LossOptions(OptionGroup):
    """Kind and weighting of the loss."""

    title: ClassVar[str] = "Loss"

    loss_type: Literal["l2", "l1", "huber", "smooth_l1"] = option(
        "l2", help="what is made of the difference between prediction and target: square, absolute value, or between"
    )
    huber_schedule: Literal["constant", "exponential", "snr"] = option(
        "snr", help="how the threshold of huber and smooth_l1 falls with a sample's noise: not, or to huber_c"
    )
    huber_c: float = option(
        0.1,
        gt=0,
        help="lowest threshold of huber and smooth_l1: differences above the threshold count less than squared",
    )
    huber_scale: float = option(1.0, gt=0, help="factor of the threshold of huber and smooth_l1")
    masked_loss: bool = option(
        False,
        help="the pictures of conditioning_data_dir are masks: what is black in them does not count in the loss; not"
        " for ControlNets, whose pictures to draw after are there",
    )
    min_snr_gamma: float | None = option(None, ge=0, help="gamma of min-SNR weighting; 0 is off")
    debiased_estimation_loss: bool = option(
        False, help="weight the loss by 1/sqrt(SNR), that of velocity by sqrt(SNR)/(SNR+1)"
    )
    scale_v_pred_loss_like_noise_pred: bool = option(
        False, help="weight v loss by SNR/(SNR+1), as noise loss is; needs v_parameterization"
    )
    v_pred_like_loss: float | None = option(
        None, ge=0, help="add the loss times (SNR+1)/SNR times this; not with v_parameterization"
    )
