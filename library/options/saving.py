# ruff: noqa: RUF009 - option() declares a field
"""Options of what the run leaves: models, states, metadata, uploads, previews, logs, and of the configuration file."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from library.options.base import OptionGroup, option

Sampler = Literal[
    "ddim",
    "pndm",
    "lms",
    "euler",
    "euler_a",
    "heun",
    "dpm_2",
    "dpm_2_a",
    "dpmsolver",
    "dpmsolver++",
    "dpmsingle",
    "k_lms",
    "k_euler",
    "k_euler_a",
    "k_dpm_2",
    "k_dpm_2_a",
]


@dataclass(frozen=True, kw_only=True)
class SaveOptions(OptionGroup):
    """Model files and training states."""

    title: ClassVar[str] = "Saving and resuming"

    output_dir: str | None = option(None, help="folder of models, states and previews", metavar="DIR")
    output_name: str | None = option(None, help="stem of all saved files", metavar="NAME")
    save_precision: Literal["float", "fp16", "bf16"] | None = option(
        None, help="number type of saved models; that of training when absent"
    )
    save_every_n_epochs: int | None = option(None, ge=1, help="save a model after every N-th epoch")
    save_every_n_steps: int | None = option(None, ge=1, help="save a model after every N-th optimizer step")
    save_n_epoch_ratio: int | None = option(None, ge=0, help="save about N models, evenly over the epochs; 0 for none")
    save_last_n_epochs: int | None = option(None, ge=1, help="keep only the newest N models of epochs")
    save_last_n_epochs_state: int | None = option(
        None, ge=1, help="keep only the newest N states of epochs; save_last_n_epochs when absent"
    )
    save_last_n_steps: int | None = option(None, ge=1, help="remove models of steps that are more than N steps old")
    save_last_n_steps_state: int | None = option(
        None, ge=1, help="remove states of steps that are more than N steps old; save_last_n_steps when absent"
    )
    save_state: bool = option(False, help="beside each saved model write a state folder to resume from")
    save_state_on_train_end: bool = option(False, help="write a state folder at the end of training")
    resume: str | None = option(None, help="state folder of the run to continue", metavar="DIR")
    allow_mismatch: bool = option(
        False, help="resume although options, data or model that change the result are different"
    )


@dataclass(frozen=True, kw_only=True)
class NetworkFileOptions(OptionGroup):
    """The form of saved networks."""

    title: ClassVar[str] = "File format"

    save_model_as: Literal["ckpt", "pt", "safetensors"] | None = option(
        "safetensors", help="file format of saved models"
    )


@dataclass(frozen=True, kw_only=True)
class ModelFileOptions(OptionGroup):
    """The form of whole saved models."""

    title: ClassVar[str] = "File format"

    save_model_as: Literal["ckpt", "safetensors", "diffusers", "diffusers_safetensors"] | None = option(
        None,
        help="form of saved models: one file, or a Diffusers folder (with safetensors in either case);"
        " that of the base model when absent",
    )
    use_safetensors: bool = option(
        False, help="save safetensors where the base model is a .ckpt file and save_model_as is absent"
    )


@dataclass(frozen=True, kw_only=True)
class MetadataOptions(OptionGroup):
    """What is written into the header of a saved model."""

    title: ClassVar[str] = "Metadata"

    metadata_title: str | None = option(None, help="title; output_name when absent")
    metadata_author: str | None = option(None, help="author")
    metadata_description: str | None = option(None, help="description")
    metadata_license: str | None = option(None, help="licence")
    metadata_tags: str | None = option(None, help="tags, separated by commas")
    training_comment: str | None = option(None, help="free text kept as ss_training_comment")
    no_metadata: bool = option(False, help="write only the few keys that programs need")


@dataclass(frozen=True, kw_only=True)
class HubOptions(OptionGroup):
    """Upload to and download from the Hugging Face hub."""

    title: ClassVar[str] = "Hugging Face hub"

    huggingface_repo_id: str | None = option(
        None, help="repository that receives every saved model; switches uploading on", metavar="OWNER/NAME"
    )
    huggingface_repo_type: str | None = option(None, help="type of the repository; model when absent", metavar="TYPE")
    huggingface_path_in_repo: str | None = option(
        None, help="folder in the repository; its root when absent", metavar="PATH"
    )
    huggingface_token: str | None = option(
        None, secret=True, help="access token; the environment variable HF_TOKEN does as well", metavar="TOKEN"
    )
    huggingface_repo_visibility: str | None = option(
        None, help="public makes a new repository public; it is private otherwise", metavar="WORD"
    )
    save_state_to_huggingface: bool = option(False, help="upload state folders too")
    resume_from_huggingface: bool = option(
        False, help="read resume as owner/name/path[:revision[:type]] and download it first"
    )
    async_upload: bool = option(False, help="upload in the background; the last upload is waited for")


@dataclass(frozen=True, kw_only=True)
class SampleOptions(OptionGroup):
    """Preview pictures while training."""

    title: ClassVar[str] = "Previews"

    sample_prompts: str | None = option(
        None,
        help="file of prompts, .txt, .toml or .json, to draw at the end, and when the next options say so",
        metavar="FILE",
    )
    sample_at_first: bool = option(False, help="draw previews before the first step")
    sample_every_n_steps: int | None = option(None, ge=1, help="draw previews after every N-th optimizer step")
    sample_every_n_epochs: int | None = option(
        None, ge=1, help="draw previews after every N-th epoch; sample_every_n_steps is then ignored"
    )
    sample_sampler: Sampler = option("ddim", help="sampler of previews that name none themselves")


@dataclass(frozen=True, kw_only=True)
class ConsoleOptions(OptionGroup):
    """Messages on the console."""

    title: ClassVar[str] = "Messages"

    console_log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] | None = option(
        None, help="lowest severity of messages shown; INFO when absent"
    )
    console_log_file: str | None = option(
        None, help="write messages to this file, emptied first, instead of the console", metavar="FILE"
    )
    console_log_simple: bool = option(False, help="plain lines on standard output, without colours")


@dataclass(frozen=True, kw_only=True)
class LogOptions(OptionGroup):
    """Scalars and pictures for TensorBoard and wandb."""

    title: ClassVar[str] = "Logs"

    logging_dir: str | None = option(None, help="folder of the logs of scalars", metavar="DIR")
    log_with: Literal["tensorboard", "wandb", "all"] | None = option(
        None, help="where scalars go; tensorboard when only logging_dir is given"
    )
    log_prefix: str | None = option(None, help="text before the time stamp in the log folder's name", metavar="TEXT")
    log_tracker_name: str | None = option(None, help="name of the tracker or project", metavar="NAME")
    log_tracker_config: str | None = option(
        None, help="TOML file whose content is handed to the tracker at its start", metavar="FILE"
    )
    wandb_run_name: str | None = option(None, help="name of the run in wandb", metavar="NAME")
    wandb_api_key: str | None = option(
        None, secret=True, help="key for wandb; WANDB_API_KEY does as well", metavar="KEY"
    )


@dataclass(frozen=True, kw_only=True)
class ConfigOptions(OptionGroup):
    """The file that options come from."""

    title: ClassVar[str] = "Configuration file"

    config_file: str | None = option(
        None,
        help="TOML file with options; .toml is appended when missing. The command line wins over it",
        metavar="FILE",
    )
    output_config: bool = option(False, help="write the options of this command line to config_file, and stop")
