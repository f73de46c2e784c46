"""The interrogator: it finds the tokens that a network answers to, of SD1, SD2 and SDXL."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from library.models import load
from library.models.load import load_parts, recognise
from library.text.encode import encode_rows
from networks import lora_interrogator
from networks.editing.interrogate import differences, load_encoders
from networks.targets import Target, text_encoder_targets
from networks.weights import write_weights
from tests.toy import write_toy_checkpoint

LAYER = {"sd1": (None, True), "sd2": (None, True), "sdxl": (2, False)}


def network_for(model: Path, path: Path, encoder: int = 0) -> tuple[Path, Tensor]:
    """A LoRA on one layer of one encoder, and its weight change."""
    _, targets = encoders_of(model)
    (target,) = [one for one in targets if one.encoder == encoder and one.name.endswith("encoder_layers_0_mlp_fc1")]
    out, inner = target.layer.weight.shape  # type: ignore[union-attr, misc]
    generator = torch.Generator().manual_seed(1)
    pair = {
        "lora_down.weight": torch.randn(2, int(inner), generator=generator),
        "lora_up.weight": torch.randn(int(out), 2, generator=generator),
        "alpha": torch.tensor(1.0),
    }
    write_weights(path, {f"{target.name}.{key}": value for key, value in pair.items()}, None, {})
    return path, pair["lora_up.weight"] @ pair["lora_down.weight"] * 0.5


def encoders_of(model: Path) -> tuple[list[nn.Module], list[Target]]:
    spec = recognise(model).spec
    parts = load_parts(model, spec, dict.fromkeys(spec.text_parts, load.Target(torch.float32)))
    modules = [parts[name] for name in spec.text_parts]
    return modules, text_encoder_targets(modules)


@pytest.mark.parametrize(("family", "encoder"), [("sd1", 0), ("sd2", 0), ("sdxl", 0), ("sdxl", 1)])
@torch.no_grad()
def test_change_is_that_of_the_states(tmp_path: Path, family: str, encoder: int) -> None:
    model = tmp_path / "model.safetensors"
    write_toy_checkpoint(model, family)
    network, delta = network_for(model, tmp_path / "net.safetensors", encoder)
    found = load_encoders(model, str(network), None, torch.device("cpu"))
    change = differences(found, 70, 32)
    assert change.shape == (70,)
    modules, targets = encoders_of(model)
    layer, norm = LAYER[family]
    for token in (0, 32, 69):
        ids = torch.tensor([[49406, token, 49407]])
        plain = [encode_rows(module, ids, layer, norm) for module in modules]
        (weight,) = [
            one.layer.weight for one in targets if one.encoder == encoder and one.name.endswith("layers_0_mlp_fc1")
        ]
        weight.add_(delta)  # type: ignore[union-attr, operator]
        merged = [encode_rows(module, ids, layer, norm) for module in modules]
        weight.sub_(delta)  # type: ignore[union-attr, operator]
        expected = torch.cat([(b - a).abs() for a, b in zip(plain, merged, strict=True)], dim=-1).mean()
        assert float(expected) > 0.01
        torch.testing.assert_close(change[token], expected, rtol=1e-3, atol=1e-6)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    model = tmp_path / "model.safetensors"
    write_toy_checkpoint(model, "sd1")
    network, _ = network_for(model, tmp_path / "net.safetensors")
    words = ["--sd_model", str(model), "--model", str(network), "--batch_size", "4096", "--clip_skip", "2"]
    assert lora_interrogator.main(words) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 100
    assert [row.split(":")[0] for row in rows[:2]] == ["[1]", "[2]"]
    values = [float(row.rsplit(": ", 1)[1]) for row in rows]
    assert values == sorted(values, reverse=True)


def test_refuses_what_has_no_text_encoder_or_another_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model.safetensors"
    write_toy_checkpoint(model, "sd1")
    pair = {"lora_down.weight": torch.ones(1, 32), "lora_up.weight": torch.ones(32, 1)}
    for module, text in (
        ("lora_unet_mid_block_attentions_0_proj_in", "no weights for text encoders"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", "made for another base model"),
    ):
        path = tmp_path / "net.safetensors"
        write_weights(path, {f"{module}.{name}": tensor for name, tensor in pair.items()}, None, {})
        assert lora_interrogator.main(["--sd_model", str(model), "--model", str(path)]) == 1
        assert text in capsys.readouterr().err
