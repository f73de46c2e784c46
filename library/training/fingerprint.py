"""What must not change between the sessions of one run: options that change the mathematics, the data, the model.

An option changes the mathematics unless `OPTION_ROLES`, the one table of roles, says something else of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from library.data.records import ImageRecord, ResolvedDataset, SubsetSpec


class Role(Enum):
    """What a changed option changes."""

    MATHEMATICS = "mathematics"  # the result
    LENGTH = "length"  # the result, if something depends on how long the run is
    DATA = "data"  # what is read; the data themselves are compared
    MODEL = "model"  # which files are read; their contents are compared
    CADENCE = "cadence"  # when something is written
    PATH = "path"  # where something is written or kept
    MACHINE = "machine"  # how it is computed, not what
    TEXT = "text"  # names and descriptions
    COMMAND = "command"  # what this start of the program does


def _roles(**names: str) -> dict[str, Role]:
    return {name: Role[role.upper()] for role, listed in names.items() for name in listed.split()}


OPTION_ROLES: Mapping[str, Role] = _roles(
    length="max_train_steps max_train_epochs",
    data="""
        caption_extension caption_extention train_data_dir reg_data_dir in_json dataset_config dataset_class
        dataset_repeats on_bad_image on_bad_caption allow_captionless conditioning_data_dir
    """,
    model="""
        pretrained_model_name_or_path vae network_weights base_weights weights controlnet_model_name_or_path
    """,
    cadence="""
        save_every_n_epochs save_every_n_steps save_n_epoch_ratio save_last_n_epochs save_last_n_epochs_state
        save_last_n_steps save_last_n_steps_state save_state save_state_on_train_end sample_at_first
        sample_every_n_steps sample_every_n_epochs sample_with_ema
        validate_every_n_steps validate_every_n_epochs max_validation_steps
    """,
    path="""
        tokenizer_cache_dir output_dir output_name resume logging_dir log_tracker_config console_log_file
        sample_prompts huggingface_repo_id huggingface_repo_type huggingface_path_in_repo config_file
    """,
    machine="""
        gradient_checkpointing sdpa xformers diffusers_xformers mem_eff_attn lowram highvram torch_compile
        dynamo_backend use_safetensors
        ema_device deterministic ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph max_data_loader_n_workers
        persistent_data_loader_workers cache_latents_to_disk vae_batch_size
        cache_text_encoder_outputs cache_text_encoder_outputs_to_disk save_model_as save_precision
        huggingface_token huggingface_repo_visibility save_state_to_huggingface resume_from_huggingface
        async_upload console_log_level console_log_simple log_with wandb_api_key sample_sampler
    """,
    text="""
        metadata_title metadata_author metadata_description metadata_license metadata_tags training_comment
        no_metadata log_prefix log_tracker_name wandb_run_name
    """,
    command="allow_mismatch dry_run debug_dataset output_config skip_existing sdxl on_nan",
)

_UNAFFECTED_BY_LENGTH = ("constant", "constant_with_warmup", "inverse_sqrt", "piecewise_constant")


def role_of(name: str) -> Role:
    """The role of an option by its flat name; one that nobody classified could change the result."""
    return OPTION_ROLES.get(name, Role.MATHEMATICS)


def fingerprint(
    options: Mapping[str, Any], data: Mapping[str, Any] | None = None, model: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a state records, as plain JSON values.

    ``options``: all options by flat name. ``data``: `data_facts`, and the number of processes. ``model``: content
    hashes of the base model, the VAE, and networks that were loaded or merged (never their paths).
    """
    kept = {name: value for name, value in options.items() if role_of(name) is Role.MATHEMATICS}
    if _length_matters(options):
        kept |= {name: value for name, value in options.items() if role_of(name) is Role.LENGTH}
    sections = {"options": dict(sorted(kept.items())), "data": dict(data or {}), "model": dict(model or {})}
    return json.loads(json.dumps(sections, default=str))


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """One line for each thing that differs between two fingerprints; what one of them does not record is not
    compared.
    """
    lines: list[str] = []
    for section in ("options", "data", "model"):
        before, now = saved.get(section, {}), current.get(section, {})
        for name in before:
            if name in now and before[name] != now[name]:
                label = name if section == "options" else f"{section}: {name}"
                lines.append(f"{label}: {_shown(before[name])} in the state, {_shown(now[name])} now")
    return lines


def data_facts(datasets: Iterable[ResolvedDataset]) -> dict[str, Any]:
    """What the training data are: counts to read and digests to compare, for each data set."""
    facts: dict[str, Any] = {}
    for number, dataset in enumerate(datasets, 1):
        records = sorted(dataset.records, key=lambda record: record.key)
        fits = {record.key: fit for record, fit in zip(dataset.records, dataset.fits, strict=True)}
        prefix = f"data set {number} "
        facts[prefix + "images"] = len(records)
        facts[prefix + "samples per epoch"] = sum(record.repeats for record in records)
        facts[prefix + "batch size"] = dataset.spec.batch_size
        facts[prefix + "image list"] = _digest((r.key, r.repeats, r.is_reg, r.subset) for r in records)
        facts[prefix + "image sizes and buckets"] = _digest((r.key, r.size, fits[r.key]) for r in records)
        facts[prefix + "captions"] = _digest((r.key, r.caption) for r in records)
        paired = [(r.key, os.path.basename(r.conditioning_path)) for r in records if r.conditioning_path is not None]
        if paired:
            facts[prefix + "conditioning pictures"] = _digest(paired)
        masks = [(r.key, _mask_name(r, dataset.subset_of(r))) for r in records]
        if any(name for _, name in masks):
            facts[prefix + "masks"] = _digest(masks)
        facts[prefix + "rules"] = _digest(_rules(dataset))
    return facts


def _rules(dataset: ResolvedDataset) -> Iterable[Any]:
    """How the images are used: everything of the specification but where the files are."""
    spec = dataclasses.replace(dataset.spec, subsets=())
    yield spec
    for subset in dataset.spec.subsets:
        yield dataclasses.replace(
            subset, image_dir=None, metadata_file=None, conditioning_data_dir=None, mask_dir=None, caption_extension=""
        )


def _mask_name(record: ImageRecord, subset: SubsetSpec) -> str:
    if record.mask_path is not None:
        return os.path.basename(record.mask_path)
    return "alpha" if subset.uses_alpha else ""


def _digest(items: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr(item).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()[:16]


def _length_matters(options: Mapping[str, Any]) -> bool:
    """True if a run of another length has other rates or captions at the same step."""
    schedule = str(options.get("lr_scheduler", "constant"))
    warmup = options.get("lr_warmup_steps") or 0
    share = isinstance(warmup, str) or 0 < warmup < 1
    by_class = bool(options.get("lr_scheduler_type"))
    return (
        (schedule not in _UNAFFECTED_BY_LENGTH and not by_class)
        or share
        or 0 < (options.get("token_warmup_step") or 0) < 1
    )


def _shown(value: Any) -> str:
    return str(value) if not isinstance(value, str) else (value or '""')
