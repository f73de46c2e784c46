"""Every command of the guide to the tools runs, on small files of the names that it uses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from networks import convert_lora
from networks.lora import create_network
from networks.weights import write_weights
from tests.generation_fixtures import write_network
from tests.guides import Row, check_command, commands_of, script_and_options
from tests.house.source_map import ROOT
from tests.networks_fixtures import randomise
from tests.toy import toy_modules, write_toy_checkpoint

TOOLS = (
    "networks/merge_lora.py",
    "networks/sdxl_merge_lora.py",
    "networks/svd_merge_lora.py",
    "networks/convert_lora.py",
    "networks/resize_lora.py",
    "networks/extract_lora_from_models.py",
    "networks/extract_lora_from_dylora.py",
    "networks/check_lora_weights.py",
    "networks/lora_interrogator.py",
    "tools/show_metadata.py",
)
PRINTED = {
    "networks/check_lora_weights.py": "lora_te_text_model_encoder_layers_0",
    "networks/lora_interrogator.py": "[100]: ",
    "tools/show_metadata.py": '"ss_training_comment": "x"',
}
COMMANDS = commands_of(ROOT / "docs" / "lora_tools.md")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has at hand: a model and a tuned one, LoRA files, a DyLoRA, and of SDXL a model and a LoRA."""
    place = tmp_path_factory.mktemp("files")
    modules = toy_modules("sd1")
    write_toy_checkpoint(place / "original.safetensors")
    torch.manual_seed(0)
    network = create_network(1.0, 4, 4.0, None, modules["text_encoder"], modules["unet"])
    network.apply_to(modules["text_encoder"], modules["unet"])
    randomise(network)
    for name in ("lora", "dylora"):
        write_weights(place / f"{name}.safetensors", network.state_dict(), None, {"ss_training_comment": "x"})
    network.detach()
    write_toy_checkpoint(place / "tuned.safetensors", seed=1)
    write_network(place / "second.safetensors", seed=2)
    write_toy_checkpoint(place / "sdxl.safetensors", "sdxl")
    write_network(place / "sdxl_lora.safetensors", "sdxl")
    names = ["--model", str(place / "lora.safetensors"), "--save_to", str(place / "peft.safetensors")]
    assert convert_lora.main([*names, "--to", "diffusers"]) == 0
    return place


def test_the_guide_has_commands_for_every_tool() -> None:
    assert {script_and_options(command)[0] for command in COMMANDS} == set(TOOLS)


def promise(command: str) -> Row:
    """The file or files that ``--save_to`` names (a Diffusers folder, one for each rank), else some lines of text."""
    script, words = script_and_options(command)
    if "--save_to" not in words:
        return Row(command, says=PRINTED[script])
    target = Path(words[words.index("--save_to") + 1])
    made = f"{target.stem}*{target.suffix}" if target.suffix else f"{target}/model_index.json"
    return Row(command, (made,))


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    check_command(command, promise(command), folder, lambda: "".join(capsys.readouterr()))
