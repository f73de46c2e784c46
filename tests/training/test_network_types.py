"""Short runs of the trainer with each type of network: it starts from the model as it is, learns, goes on, draws."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.generation.app import run
from library.options.scripts import GEN_IMG
from networks.kinds import adapter_of, read_network
from tests.cells_fixtures import BLIND_AT_64_PX, TEXT_LAYERS, UNET_LAYERS, UNET_LAYERS_WITH_CONVOLUTIONS, Runner
from tests.training.runs import stop_after, tensors, train

# module and arguments, the type that its file holds, a tensor that starts at zero
CELLS = {
    "loha": (("networks.loha",), "LohaAdapter", "hada_w2_a"),
    "lokr": (("networks.lokr", "factor=2"), "LokrAdapter", "lokr_w2_b"),
    "tucker": (("networks.lora", "use_tucker=True", "conv_dim=2"), "LoraAdapter", "lora_up.weight"),
    "dora": (("networks.lora", "dora_wd=True", "conv_dim=2"), "DoraLora", "lora_up.weight"),
    "dora loha": (("networks.loha", "dora_wd=True"), "DoraLoha", "hada_w2_a"),
    "dora lokr": (("networks.lokr", "dora_wd=True", "factor=2"), "DoraLokr", "lokr_w2_b"),
}


@pytest.fixture
def fit(tmp_path, model, photos, monkeypatch) -> Runner:
    return Runner(tmp_path, {"sd1": model}, photos, monkeypatch)


def options(cell: str) -> tuple[str, ...]:
    (module, *args), _, _ = CELLS[cell]
    return ("--network_module", module, *(("--network_args", *args) if args else ()))


def draw(model: Path, folder: Path, *more: str) -> np.ndarray:
    command = [
        "--ckpt",
        str(model),
        "--prompt",
        "a cat",
        "--outdir",
        str(folder),
        "--steps",
        "2",
        "--W",
        "64",
        "--H",
        "64",
    ]
    assert run(GEN_IMG, [*command, "--sampler", "euler", "--seed", "5", *more]) == 0
    (picture,) = folder.glob("*.png")
    return np.asarray(Image.open(picture)).astype(int)


@pytest.fixture(scope="module")
def plain_losses(model, photos, tmp_path_factory) -> list[float]:
    """Of networks.lora, whose start is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        return Runner(tmp_path_factory.mktemp("plain"), {"sd1": model}, photos, patch)().losses


@pytest.fixture(scope="module")
def without(model, tmp_path_factory) -> np.ndarray:
    return draw(model, tmp_path_factory.mktemp("without"))


@pytest.mark.parametrize("cell", list(CELLS))
def test_every_layer_learns_and_the_file_draws(fit, model, plain_losses, without, tmp_path, cell):
    done = fit(*options(cell))
    _, kind, zero = CELLS[cell]
    # the first step is that of the model itself, to the last bit
    assert done.losses[0] == plain_losses[0]
    assert done.losses[1:] != plain_losses[1:]
    with_convolutions = any(argument.startswith("conv_dim") for argument in CELLS[cell][0])
    assert done.count("lora_unet_") == (UNET_LAYERS_WITH_CONVOLUTIONS if with_convolutions else UNET_LAYERS)
    assert done.count("lora_te_") == TEXT_LAYERS
    _, kinds = read_network(done.file)
    assert {found.__name__ for found in kinds.values()} == {kind}
    moved = {key.partition(".")[0] for key, tensor in done.tensors.items() if key.endswith(f".{zero}") and tensor.any()}
    assert moved >= {key.partition(".")[0] for key in done.tensors if key.endswith(f".{zero}")} - BLIND_AT_64_PX
    strong = ("--network_weights", str(done.file), "--network_mul", "20")
    drawn = draw(model, tmp_path / "with", *strong)
    assert np.abs(drawn - without).max() > 2
    merged = draw(model, tmp_path / "merged", *strong, "--network_merge")
    assert np.abs(merged - drawn).max() <= 1


@pytest.mark.parametrize("module", ["networks.loha", "networks.lora"])
def test_ranks_and_kinds_of_a_file_go_on(fit, module):
    first = fit("--network_module", "networks.loha", "--network_dim", "3", "--network_alpha", "2")
    second = fit("--network_module", module, "--network_weights", str(first.file), "--dim_from_weights")
    assert second.tensors.keys() == first.tensors.keys()
    assert (second.metadata["ss_network_dim"], second.metadata["ss_network_alpha"]) == ("3", "2.0")
    for key, tensor in second.tensors.items():
        assert tensor.shape == first.tensors[key].shape
        assert (tensor - first.tensors[key]).abs().max() < 0.02


def test_bfloat16_starts_from_the_model_too(fit):
    more = ("--mixed_precision", "bf16")
    assert fit(*options("dora"), *more).losses[0] == fit(*more).losses[0]


def test_trained_magnitudes_survive_an_interruption(model, photos, tmp_path, monkeypatch):
    """Magnitudes that follow the weight until they are trained must not do so again after resuming."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(model, photos, whole, *options("dora")) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert train(model, photos, broken, *options("dora")) == 0
    assert train(model, photos, broken, *options("dora"), "--resume", str(broken / "toy-step00000002-state")) == 0
    left, right = tensors(whole / "toy.safetensors"), tensors(broken / "toy.safetensors")
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_arguments_of_another_form_are_refused(model, photos, tmp_path, capsys):
    wrong = ("--network_args", "wd_on_output=False")
    assert train(model, photos, tmp_path, *wrong) == 1
    assert "dora_wd" in capsys.readouterr().err
    assert train(model, photos, tmp_path, "--network_module", "networks.lokr", "--network_args", "factor=0") == 1
    assert "-1 for the most even" in capsys.readouterr().err


def test_the_norm_limit_holds_for_loha_and_lokr(fit):
    for cell in ("loha", "lokr"):
        done = fit(*options(cell), "--scale_weight_norms", "0.001")
        table, _ = read_network(done.file)
        norms = [float(adapter_of(name, own).delta_norm()) for name, own in table.modules.items()]
        assert max(norms) == pytest.approx(0.001, rel=1e-3)


@pytest.mark.parametrize("cell", CELLS)
def test_the_report_measures_every_type(model, photos, tmp_path, capsys, cell):
    """Also those whose change depends on the base model, which the file alone does not tell."""
    assert train(model, photos, tmp_path, *options(cell), "--max_train_steps", "1") == 0
    said = capsys.readouterr().err
    assert "not measured" not in said
    norms = re.search(r"norm of the weight change by block: (.*)", said)
    assert norms is not None
    assert all(float(part.split()[-1]) > 0 for part in norms[1].split(", ") if "down_blocks_3" not in part)
