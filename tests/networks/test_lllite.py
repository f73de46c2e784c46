"""ControlNet-LLLite: names in files, the formula, nothing at the start, several nets, sizes that change."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from library.log import UserError
from library.models import build
from library.models.spec import SDXL
from networks.lllite import ControlNetLLLite, LLLiteSize, load_lllite
from tests.toy import toy_modules

KEYS = Path(__file__).parents[1] / "golden" / "data" / "keys" / "lllite_sdxl_emb32_dim64.tsv.gz"
SMALL = LLLiteSize(8, 6)
NAME = "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
DEEP = "lllite_unet_middle_block_1_transformer_blocks_1_attn2_to_q"


@pytest.fixture
def unet() -> Any:
    return toy_modules("sdxl")["unet"]


def network(unet: nn.Module, seed: int = 0) -> ControlNetLLLite:
    """A network that does something."""
    made = ControlNetLLLite(unet, SMALL)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return made.eval().requires_grad_(False)


def pictures(count: int = 1, seed: int = 1, size: int = 64) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def call(unet: Any, rows: int = 1, cells: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(1, 4, cells, cells, generator=generator).expand(rows, -1, -1, -1)
    text = torch.randn(1, 7, 96, generator=generator).expand(rows, -1, -1)
    added = {"text_embeds": torch.ones(rows, 48), "time_ids": torch.ones(rows, 6)}
    with torch.no_grad():
        return unet(latents, torch.full((rows,), 500), text, added_cond_kwargs=added).sample


def test_names_and_shapes_are_those_of_existing_files() -> None:
    listed = list(csv.DictReader(gzip.decompress(KEYS.read_bytes()).decode().splitlines(), delimiter="\t"))
    with torch.device("meta"):
        made = ControlNetLLLite(build.empty_unet(SDXL.unet), LLLiteSize(32, 64))
    shapes = {key: "x".join(map(str, tensor.shape)) for key, tensor in made.state_dict().items()}
    assert shapes == {row["key"]: row["shape"] for row in listed}
    assert len(list(made.children())) == 136


def test_a_fresh_network_changes_nothing(unet: Any) -> None:
    """Also with a picture: the bias of the last layer is zero too."""
    plain = call(unet)
    fresh = ControlNetLLLite(unet)
    fresh.attach()
    fresh.set_condition(pictures())
    assert torch.equal(call(unet), plain)


def expected(state: dict[str, Tensor], name: str, x_BNI: Tensor, images: Tensor, multiplier: float) -> Tensor:
    """The layer's input as the description of the format says it, written out."""
    get = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
    c = F.relu(F.conv2d(images, get["conditioning1.0.weight"], get["conditioning1.0.bias"], stride=4))
    if "conditioning1.4.weight" in get:
        c = F.relu(F.conv2d(c, get["conditioning1.2.weight"], get["conditioning1.2.bias"], stride=4))
        c = F.conv2d(c, get["conditioning1.4.weight"], get["conditioning1.4.bias"], stride=2)
    else:
        c = F.conv2d(c, get["conditioning1.2.weight"], get["conditioning1.2.bias"], stride=4)
    tokens = c.flatten(2).transpose(1, 2)
    tokens = tokens.repeat(len(x_BNI) // len(tokens), 1, 1)
    down = F.relu(F.linear(x_BNI, get["down.0.weight"], get["down.0.bias"]))
    mid = F.relu(F.linear(torch.cat([tokens, down], dim=2), get["mid.0.weight"], get["mid.0.bias"]))
    return x_BNI + multiplier * F.linear(mid, get["up.0.weight"], get["up.0.bias"])


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (NAME, "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"),
        (DEEP, "mid_block.attentions.0.transformer_blocks.1.attn2.to_q"),
    ],
)
def test_the_layer_gets_what_the_formula_says(unet: Any, name: str, path: str) -> None:
    made, images, layer = network(unet), pictures(2), unet.get_submodule(path)
    given: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, args: given.append(args[0]))  # before ours, which goes to the front
    changed: list[Tensor] = []
    layer.register_forward_hook(lambda _, args, output: changed.append(args[0]))
    made.attach()
    made.multiplier = 0.7
    made.set_condition(images)
    call(unet, rows=4)  # two pictures, negative and positive
    before: list[Tensor] = []
    made.detach()
    layer.register_forward_pre_hook(lambda _, args: before.append(args[0]))
    # what the layer would have got, with the layers before it still changed: ask the network itself to stand aside
    only = network(unet)
    only.attach()
    only.multiplier = 0.7
    only.set_condition(images)
    only._features.pop(name)  # pyright: ignore[reportPrivateUsage]
    call(unet, rows=4)
    wanted = expected(made.state_dict(), name, before[0], images, 0.7)
    assert (changed[0] - before[0]).abs().max() > 0.05
    assert torch.allclose(changed[0], wanted, atol=1e-5)


def test_it_acts_only_with_a_picture_and_a_strength(unet: Any) -> None:
    plain, made = call(unet), network(unet)
    made.attach()
    assert torch.equal(call(unet), plain)
    made.set_condition(pictures())
    with_picture = call(unet)
    assert (with_picture - plain).abs().max() > 0.05
    made.set_condition(pictures(seed=2))
    assert (call(unet) - with_picture).abs().max() > 1e-3
    made.multiplier = 0.0
    assert torch.equal(call(unet), plain)
    made.multiplier = 1.0
    made.set_condition(None)
    assert torch.equal(call(unet), plain)
    made.set_condition(pictures())
    made.detach()
    assert torch.equal(call(unet), plain)


def test_guidance_copies_see_the_same_picture(unet: Any) -> None:
    made = network(unet)
    made.attach()
    images = pictures(2)
    made.set_condition(images)
    both = call(unet, rows=6)  # two pictures, three copies
    for index in range(2):
        made.set_condition(images[index : index + 1])
        alone = call(unet)
        assert torch.allclose(both[index::2], alone.expand(3, -1, -1, -1), atol=1e-5)
    made.set_condition(pictures(4))
    with pytest.raises(ValueError, match="6 rows for 4"):
        call(unet, rows=6)


def test_several_nets_each_with_its_own_picture(unet: Any) -> None:
    first, second = network(unet, 1), network(unet, 2)
    for made in (first, second):
        made.attach()

    def drawn(one: Tensor | None, two: Tensor | None) -> Tensor:
        first.set_condition(one)
        second.set_condition(two)
        return call(unet)

    a, b = pictures(seed=1), pictures(seed=2)
    results = [drawn(a, b), drawn(b, a), drawn(a, None), drawn(None, b), drawn(None, None)]
    for index, one in enumerate(results):
        for other in results[index + 1 :]:
            assert (one - other).abs().max() > 1e-3


def test_latents_of_another_size_get_the_picture_at_their_size(unet: Any) -> None:
    """A picture of one colour has the same features at any size, so resizing must not change its effect."""
    made = network(unet)
    made.attach()
    flat = torch.full((1, 3, 128, 128), 0.25)
    made.set_condition(flat)
    resized = call(unet, cells=8)
    made.set_condition(flat[:, :, :64, :64])
    assert torch.allclose(resized, call(unet, cells=8), atol=1e-5)
    made.set_condition(pictures(size=128))
    assert call(unet, cells=12).isfinite().all()


def test_gradients_reach_all_tensors_with_checkpointing_too(unet: Any) -> None:
    """For training: ``up`` is not zero here, else nothing before it would learn in the first step."""

    def gradients(checkpointing: bool) -> list[Tensor]:
        made = network(unet).requires_grad_(True).train()
        made.recomputes = checkpointing
        unet.enable_gradient_checkpointing() if checkpointing else unet.disable_gradient_checkpointing()
        made.attach()
        made.set_condition(pictures())
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
        added = {"text_embeds": torch.ones(1, 48), "time_ids": torch.ones(1, 6)}
        unet(
            latents, torch.tensor([500]), torch.ones(1, 7, 96), added_cond_kwargs=added
        ).sample.square().mean().backward()
        made.detach()
        return [parameter.grad for parameter in made.parameters() if parameter.grad is not None]

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == len(list(network(unet).parameters()))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, checkpointed, strict=True))


# ---- files


def test_round_trip_and_widths_from_the_file(unet: Any, tmp_path: Path) -> None:
    made = network(unet)
    made.save_weights(tmp_path / "net.safetensors", metadata={"modelspec.title": "x"})
    loaded = load_lllite(tmp_path / "net.safetensors", unet)
    state = made.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert load_file(tmp_path / "net.safetensors").keys() == state.keys()
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_files_must_fit(unet: Any, tmp_path: Path) -> None:
    state, path = network(unet).state_dict(), tmp_path / "net.safetensors"
    cut = {key: value for key, value in state.items() if key != f"{NAME}.up.0.bias"}
    save_file(cut, path)
    with pytest.raises(UserError, match=r"1 missing: .*attn1_to_q\.up\.0\.bias"):
        load_lllite(path, unet)
    save_file({**state, f"{NAME}.up.0.bias": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="1 tensors have a wrong shape"):
        load_lllite(path, unet)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="no ControlNet-LLLite weights"):
        load_lllite(path, unet)
    save_file(state, path)
    with pytest.raises(UserError, match="for SDXL only"):
        load_lllite(path, toy_modules("sd1")["unet"])
