"""What stands in the header of a saved network: how it was trained, in the keys that other programs read.

All values are text. ``ss_*`` keys follow the common format of LoRA files; ``ss_sdt_*`` keys are additions of this
program, which readers of that format pass over. No secret and no absolute path enters: files and folders appear by
their base names.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata as packages
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoint.modelspec import CHECKPOINT_IMPLEMENTATION, Modelspec, current_time
from library.checkpoint.privacy import without_folders
from library.options import LossOptions, NoiseOptions
from library.options.base import specs_of
from library.rng import fresh_seed, seed_of

if TYPE_CHECKING:
    from library.checkpoint.hashes import FileHashes
    from library.data.facts import DatasetFacts
    from library.families.base import ModelFamily, ModelParts

MINIMAL_KEYS = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)
JSON_KEYS = ("ss_datasets", "ss_tag_frequency", "ss_dataset_dirs", "ss_reg_dataset_dirs", "ss_bucket_info")
_VERSIONED = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy")

# Options that are recorded as they are, under ss_<name>, or under the name that the format has for them.
_OTHER_NAMES = {"debiased_estimation_loss": "debiased_estimation"}
_OPTIONS = [
    *(spec.name for group in (NoiseOptions, LossOptions) for spec in specs_of(group)),
    "learning_rate",
    "unet_lr",
    "gradient_checkpointing",
    "gradient_accumulation_steps",
    "lr_warmup_steps",
    "lr_scheduler",
    "network_module",
    "network_dim",
    "network_alpha",
    "network_dropout",
    "cond_emb_dim",
    "mixed_precision",
    "full_fp16",
    "v2",
    "clip_skip",
    "cache_latents",
    "lowram",
    "training_comment",
    "max_grad_norm",
    "caption_dropout_rate",
    "caption_dropout_every_n_epochs",
    "caption_tag_dropout_rate",
    "face_crop_aug_range",
    "prior_loss_weight",
    "scale_weight_norms",
    "full_bf16",
    "fp8_base",
    "v_parameterization",
    "weighted_captions",
    "no_half_vae",
    "lr_scheduler_type",
    "lr_scheduler_num_cycles",
    "lr_scheduler_power",
    "train_text_encoder",
    "stop_text_encoder_training",
    "no_token_padding",
    "ema_decay",
    "validation_split",
    "validation_seed",
    "learning_rate_te",
    "learning_rate_te1",
    "learning_rate_te2",
    "block_lr",
    "fused_backward_pass",
    "token_string",
    "num_vectors_per_token",
    "init_word",
    "use_object_template",
    "use_style_template",
]
# And these when the data come from the command line: a data set file has them for each of its parts.
_DATA_OPTIONS = [
    "resolution",
    "color_aug",
    "flip_aug",
    "random_crop",
    "shuffle_caption",
    "enable_bucket",
    "bucket_no_upscale",
    "min_bucket_reso",
    "max_bucket_reso",
    "keep_tokens",
    "alpha_mask",
]


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What the base model is. ``resolution``: the side in pixels that modelspec takes when no resolution was given."""

    base_model_version: str
    architecture: str
    implementation: str
    resolution: int
    v_prediction: bool
    name: str | None = None
    hashes: FileHashes | None = None
    vae_name: str | None = None
    vae_hashes: FileHashes | None = None


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a run knows beside its options; the same for all files of the run.

    ``optimizer``: the recorded name of the optimizer; ``relative_step``: it makes its own learning rate (Adafactor).
    ``fingerprint``: see fingerprint.py. ``is_average``: the file holds the average of the weights (EMA). ``kind`` is
    the suffix of the architecture (lora).
    """

    session_id: int
    started_at: float
    seed: int
    optimizer: str
    num_batches_per_epoch: int
    num_epochs: int
    max_train_steps: int
    model: ModelFacts
    data: DatasetFacts
    processes: int = 1
    relative_step: bool = False
    kind: str = "lora"
    fingerprint: Mapping[str, Any] = field(default_factory=dict[str, Any])
    is_average: bool = False
    commit_hash: str = "(unknown)"


# ---- public


def build_metadata(options: Mapping[str, Any], facts: RunFacts, *, epoch: int, step: int) -> dict[str, str]:
    """All metadata of a file saved now. ``options``: all options by flat name; ``epoch`` as the file format counts it
    (finished epochs), ``step`` the optimizer steps done. With ``no_metadata`` only what programs need to use the
    file.
    """
    values = {
        **_of_options(options),
        **_of_run(options, facts, epoch, step),
        **_of_model(facts.model),
        **_of_data(options, facts),
        **_additions(options, facts),
    }
    text = {key: as_text(key, value) for key, value in values.items()}
    if options.get("no_metadata"):
        text = {key: text[key] for key in MINIMAL_KEYS if key in text}
    return {**text, **modelspec_of(options, facts).as_metadata()}


def modelspec_of(options: Mapping[str, Any], facts: RunFacts) -> Modelspec:
    """The modelspec block of the run's files."""
    side = facts.model.resolution
    given = options.get("resolution")
    return Modelspec(
        architecture=facts.model.architecture,
        implementation=facts.model.implementation if facts.kind == "lora" else CHECKPOINT_IMPLEMENTATION,
        kind=facts.kind,
        resolution=(given[0], given[1]) if given else (side, side),
        title=options.get("metadata_title") or without_folders(options.get("output_name")),
        author=options.get("metadata_author"),
        description=options.get("metadata_description"),
        license=options.get("metadata_license"),
        tags=options.get("metadata_tags"),
        v_prediction=facts.model.v_prediction,
        timesteps=(options.get("min_timestep"), options.get("max_timestep")),
        clip_skip=options.get("clip_skip"),
    )


def model_facts(family: ModelFamily, parts: ModelParts) -> ModelFacts:
    """The facts of a loaded model; reads the base model's file once for its hash."""
    prediction = parts.prediction_type
    vae = parts.vae_source
    return ModelFacts(
        base_model_version=family.base_model_version(prediction),
        architecture=family.modelspec_architecture(prediction),
        implementation=family.modelspec_implementation_network,
        resolution=family.modelspec_resolution(prediction),
        v_prediction=prediction == "v_prediction",
        name=parts.source.name,
        hashes=parts.source.hashes,
        vae_name=vae.name if vae else None,
        vae_hashes=vae.hashes if vae else None,
    )


def new_session(seed: int) -> tuple[int, float]:
    """Identity of a new run: a random number below 2**32, and the time of its start.

    With SOURCE_DATE_EPOCH set both are fixed, so that files can be byte-identical.
    """
    if os.environ.get("SOURCE_DATE_EPOCH", "").isdigit():
        return seed_of(seed, "session") % 2**32, current_time()
    return fresh_seed(), current_time()


def commit_hash() -> str:
    """The git commit of this program, or ``(unknown)``."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # or git would answer for a repository around us
        return "(unknown)"
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "(unknown)"
    return done.stdout.strip() or "(unknown)"


def as_text(key: str, value: Any) -> str:
    """The text form of a value: JSON for the keys that are JSON, else Python's own, without folders."""
    if key in JSON_KEYS:  # about the images: names of folders and tags, which may look like paths
        return json.dumps(value)
    if isinstance(value, dict | list):
        return json.dumps(without_folders(value))
    return str(without_folders(value))


# ---- the parts


def _of_options(options: Mapping[str, Any]) -> dict[str, Any]:
    result = {f"ss_{_OTHER_NAMES.get(name, name)}": options[name] for name in _OPTIONS if name in options}
    length = options.get("max_token_length")
    result["ss_max_token_length"] = None if length == 75 else length
    if "text_encoder_lr" in options:
        rates = options["text_encoder_lr"]
        result["ss_text_encoder_lr"] = rates[0] if isinstance(rates, list) and len(rates) == 1 else rates
    if options.get("network_args"):
        dropout = options.get("network_dropout")
        arguments = _pairs(options["network_args"])
        result["ss_network_args"] = arguments | ({} if dropout is None else {"dropout": dropout})
    return result


def _of_run(options: Mapping[str, Any], facts: RunFacts, epoch: int, step: int) -> dict[str, Any]:
    result: dict[str, Any] = {
        "ss_session_id": facts.session_id,
        "ss_training_started_at": facts.started_at,
        "ss_training_finished_at": current_time(),
        "ss_output_name": options.get("output_name"),
        "ss_seed": facts.seed,
        "ss_optimizer": facts.optimizer,
        "ss_num_batches_per_epoch": facts.num_batches_per_epoch,
        "ss_num_epochs": facts.num_epochs,
        "ss_max_train_steps": facts.max_train_steps,
        "ss_epoch": epoch,
        "ss_steps": step,
        "ss_sd_scripts_commit_hash": facts.commit_hash,
    }
    if facts.relative_step:
        result |= {f"ss_{name}": None for name in ("learning_rate", "unet_lr", "text_encoder_lr")}
        result["ss_lr_scheduler"] = f"adafactor:{options.get('learning_rate')}"
    return result


def _of_model(model: ModelFacts) -> dict[str, Any]:
    result: dict[str, Any] = {"ss_base_model_version": model.base_model_version}
    for prefix, name, hashes in (("sd_model", model.name, model.hashes), ("vae", model.vae_name, model.vae_hashes)):
        if name is not None:
            result[f"ss_{prefix}_name"] = name
        if name is not None and hashes is not None:
            result[f"ss_{prefix}_hash"] = hashes.legacy
            result[f"ss_new_{prefix}_hash"] = hashes.sha256
    return result


def _of_data(options: Mapping[str, Any], facts: RunFacts) -> dict[str, Any]:
    data = facts.data
    result: dict[str, Any] = {
        "ss_num_train_images": data.num_train_images,
        "ss_num_reg_images": data.num_reg_images,
        "ss_tag_frequency": data.tag_frequency,
        "ss_dataset_dirs": data.dataset_dirs,
    }
    if options.get("dataset_config") is not None:
        return result | {"ss_datasets": data.datasets}
    batch = options.get("train_batch_size", 1)
    result["ss_reg_dataset_dirs"] = data.reg_dataset_dirs
    result["ss_bucket_info"] = data.bucket_info
    result["ss_batch_size_per_device"] = batch
    result["ss_total_batch_size"] = batch * facts.processes * options.get("gradient_accumulation_steps", 1)
    return result | {f"ss_{name}": options.get(name) for name in _DATA_OPTIONS}


def _additions(options: Mapping[str, Any], facts: RunFacts) -> dict[str, Any]:
    """What the common format has no place for: the whole recipe, so that a run can be repeated from its file."""
    result: dict[str, Any] = {"ss_sdt_versions": _versions()}
    if options.get("lr_scheduler_args"):
        result["ss_lr_scheduler_args"] = _pairs(options["lr_scheduler_args"])
    if facts.is_average:
        result["ss_sdt_is_average"] = True
    if facts.fingerprint:
        result["ss_sdt_fingerprint"] = dict(facts.fingerprint)
    return result


def _pairs(items: list[str]) -> dict[str, str]:
    return {key.strip(): value for key, _, value in (item.partition("=") for item in items)}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = packages.version(name)
        except packages.PackageNotFoundError:
            continue
    return found
