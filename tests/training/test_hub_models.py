"""A base model and a VAE by their names on the hub, which is faked: whoever fetches them has the user's token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from library import hub
from tests.training.runs import train, write_photos
from tools import cache_latents, cache_text_encoder_outputs

TOKEN = "hf_of_the_user"
Main = Callable[[list[str]], int]


@pytest.fixture
def asked(model: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str | None]]:
    """Name, option and token of all that was to be fetched; everything is the toy model."""
    calls: list[tuple[str, str, str | None]] = []

    def download(
        repo_id: str, option: str, parts: object = (), token: str | None = None, variant: str | None = None
    ) -> Path:
        calls.append((repo_id, option, token))
        return model

    monkeypatch.setattr(hub, "download_model", download)
    return calls


@pytest.mark.parametrize("more", [(), ("--dry_run",)])
def test_a_run_fetches_its_models_with_the_token(asked, photos, tmp_path, more):
    names = ("--vae", "owner/vae", "--huggingface_token", TOKEN, "--max_train_steps", "1")
    assert train(Path("owner/model"), photos, tmp_path, *names, *more) == 0
    assert sorted(set(asked)) == [
        ("owner/model", "--pretrained_model_name_or_path", TOKEN),
        ("owner/vae", "--vae", TOKEN),
    ]


@pytest.mark.parametrize("main", [cache_latents.main, cache_text_encoder_outputs.main])
def test_tools_that_cache_ahead_fetch_with_the_token(asked, model_sdxl, tmp_path, monkeypatch, main: Main):
    fetch = hub.download_model
    monkeypatch.setattr(hub, "download_model", lambda *place: fetch(*place) and model_sdxl)
    data = write_photos(tmp_path, [(64, 64)])
    status = main(
        [
            "--pretrained_model_name_or_path", "owner/model", "--train_data_dir", str(data), "--resolution", "64",
            "--huggingface_token", TOKEN, "--sdxl",
        ]
    )  # fmt: skip
    assert status == 0
    assert set(asked) == {("owner/model", "--pretrained_model_name_or_path", TOKEN)}
