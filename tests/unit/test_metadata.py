"""Metadata of saved networks: the reference's keys and text forms, nothing private, and the same bytes twice."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest

import library.options as options_module
from library.checkpoint.hashes import FileHashes
from library.data.facts import DatasetFacts
from library.training.metadata import (
    MINIMAL_KEYS,
    ModelFacts,
    RunFacts,
    as_text,
    build_metadata,
    commit_hash,
    new_session,
    without_folders,
)

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden/data/lora_sd1_metadata.json").read_text())


def options(**changes) -> dict:
    """All options of the trainer at their defaults, as a flat dictionary."""
    names = [name for name in options_module.__all__ if name.endswith("Options") and name != "CacheToolOptions"]
    flat: dict = {}
    for name in names:
        flat |= dataclasses.asdict(getattr(options_module, name)())
    assert changes.keys() <= flat.keys()
    return flat | changes


# The run that the reference made the golden file with.
GOLDEN_OPTIONS = {
    "output_name": "base",
    "network_module": "networks.lora",
    "network_dim": 4,
    "network_alpha": 1.0,
    "learning_rate": 0.001,
    "max_train_steps": 100,
    "seed": 42,
    "train_batch_size": 2,
    "resolution": (256, 256),
    "enable_bucket": True,
    "min_bucket_reso": 128,
    "max_bucket_reso": 512,
    "cache_latents": True,
    "prior_loss_weight": 0.5,
}


def golden_facts(**changes) -> RunFacts:
    data = DatasetFacts(
        num_train_images=60,
        num_reg_images=2,
        datasets=[{"resolution": [256, 256]}],
        tag_frequency=json.loads(GOLDEN["ss_tag_frequency"]),
        dataset_dirs=json.loads(GOLDEN["ss_dataset_dirs"]),
        reg_dataset_dirs=json.loads(GOLDEN["ss_reg_dataset_dirs"]),
        bucket_info=json.loads(GOLDEN["ss_bucket_info"]),
    )
    model = ModelFacts(
        base_model_version="sd_v1",
        architecture="stable-diffusion-v1",
        implementation="diffusers",
        resolution=512,
        v_prediction=False,
        name="tiny_sd1.safetensors",
        hashes=FileHashes(GOLDEN["ss_sd_model_hash"], GOLDEN["ss_new_sd_model_hash"]),
    )
    facts = RunFacts(
        session_id=int(GOLDEN["ss_session_id"]),
        started_at=float(GOLDEN["ss_training_started_at"]),
        seed=42,
        optimizer="torch.optim.adamw.AdamW",
        num_batches_per_epoch=60,
        num_epochs=2,
        max_train_steps=100,
        model=model,
        data=data,
        commit_hash=GOLDEN["ss_sd_scripts_commit_hash"],
    )
    return dataclasses.replace(facts, **changes)


def build(facts: RunFacts | None = None, **changes) -> dict[str, str]:
    return build_metadata(options(**{**GOLDEN_OPTIONS, **changes}), facts or golden_facts(), epoch=2, step=100)


def test_every_key_of_the_reference_has_the_reference_s_text() -> None:
    ours = build()
    of_now = {"ss_training_finished_at", "modelspec.date"}
    expected = {key: text for key, text in GOLDEN.items() if not key.startswith("sshs_")}  # hashes are of the tensors
    assert expected.keys() - ours.keys() == set()
    assert {key: ours[key] for key in expected.keys() - of_now} == {
        key: expected[key] for key in expected.keys() - of_now
    }
    assert all(isinstance(value, str) for value in ours.values())


def test_what_this_program_adds_readers_pass_over() -> None:
    added = build().keys() - GOLDEN.keys()
    assert {"ss_full_bf16", "ss_fp8_base", "ss_min_timestep", "ss_max_timestep", "ss_sdt_versions"} <= added
    assert all(key.startswith("ss_") for key in added)
    assert "torch" in json.loads(build()["ss_sdt_versions"])
    recorded = build(golden_facts(fingerprint={"options": {"learning_rate": 0.001}}))["ss_sdt_fingerprint"]
    assert json.loads(recorded) == {"options": {"learning_rate": 0.001}}


def test_a_data_set_file_has_its_own_keys_and_none_of_the_command_line() -> None:
    data = dataclasses.replace(golden_facts().data, tag_frequency={"a": {"/o/": 1}})
    ours = build(golden_facts(data=data), dataset_config=pathlib.Path("/srv/someone/data.toml"))
    assert json.loads(ours["ss_datasets"]) == [{"resolution": [256, 256]}]
    assert json.loads(ours["ss_tag_frequency"]) == {"a": {"/o/": 1}}  # a tag is not a path
    for key in (
        "ss_resolution",
        "ss_bucket_info",
        "ss_reg_dataset_dirs",
        "ss_total_batch_size",
        "ss_batch_size_per_device",
    ):
        assert key not in ours
    assert "someone" not in json.dumps(ours)


def test_no_metadata_keeps_what_programs_need() -> None:
    ours = build(no_metadata=True, network_args=["conv_dim=4"])
    assert {key for key in ours if key.startswith("ss_")} == set(MINIMAL_KEYS)
    assert ours["modelspec.architecture"] == "stable-diffusion-v1/lora"


def test_network_arguments_are_json_without_an_empty_dropout() -> None:
    assert "ss_network_args" not in build(network_dropout=0.1)
    given = {"network_args": ["conv_dim=4", "algo=lora=x"]}
    assert json.loads(build(**given)["ss_network_args"]) == {"conv_dim": "4", "algo": "lora=x"}
    with_dropout = json.loads(build(**given, network_dropout=0.1)["ss_network_args"])
    assert with_dropout["dropout"] == 0.1


def test_rates_of_an_optimizer_that_makes_its_own() -> None:
    ours = build(golden_facts(relative_step=True), unet_lr=1e-4, text_encoder_lr=[5e-5])
    assert ours["ss_learning_rate"] == ours["ss_unet_lr"] == ours["ss_text_encoder_lr"] == "None"
    assert ours["ss_lr_scheduler"] == "adafactor:0.001"
    assert build(text_encoder_lr=[5e-5])["ss_text_encoder_lr"] == "5e-05"
    assert json.loads(build(text_encoder_lr=[5e-5, 0.0])["ss_text_encoder_lr"]) == [5e-5, 0.0]


def test_neither_secrets_nor_folders_of_this_machine_enter() -> None:
    recipe = {"options": {"network_args": ["preset=/srv/someone/preset.toml"]}}
    ours = build(
        golden_facts(fingerprint=recipe),
        huggingface_token="hf_secret",
        wandb_api_key="key_secret",
        pretrained_model_name_or_path="/srv/someone/models/a.safetensors",
        output_dir="/srv/someone/out",
        output_name="/srv/someone/out/name",
        network_args=["preset=/srv/someone/preset.toml", "other=D:\\someone\\x.toml"],
        train_data_dir="/srv/someone/photos",
        network_weights="/srv/someone/w.safetensors",
        logging_dir="/srv/someone/logs",
    )
    text = json.dumps(ours)
    assert "secret" not in text
    assert "someone" not in text
    assert json.loads(ours["ss_network_args"]) == {"preset": "preset.toml", "other": "x.toml"}


def test_paths_are_cut_but_text_is_not() -> None:
    nested = {"a": ("/x/y.png", [pathlib.Path("/p/q")], "D:\\a\\b"), "tag/with slash": "a / b"}
    assert without_folders(nested) == {"a": ("y.png", ["q"], "b"), "tag/with slash": "a / b"}
    assert as_text("ss_bucket_info", None) == "null"
    assert as_text("ss_noise_offset", None) == "None"
    assert as_text("ss_resolution", (512, 768)) == "(512, 768)"


def test_files_are_identical_when_the_time_is_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    session = new_session(42)
    assert session == new_session(42)
    assert session[0] != new_session(43)[0]
    assert session[1] == 1700000000.0
    assert build() == build()
    assert build()["ss_training_finished_at"] == "1700000000.0"
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    assert new_session(42)[0] != new_session(42)[0]


def test_commit_is_a_hash_or_unknown() -> None:
    found = commit_hash()
    assert found == "(unknown)" or (len(found) == 40 and int(found, 16) >= 0)
