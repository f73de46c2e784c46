"""Regions: masks from pictures, the sum rule of attention, whose text and whose layers a network changes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from library.generation.denoise import Setup
from library.generation.jobs import Defaults, Job, Shared, settle
from library.generation.lines import parse_line
from library.generation.networks import attach_networks
from library.generation.output import job_from_json
from library.generation.regions import (
    RegionalAttention,
    RegionalBatch,
    Regions,
    read_masks,
    region_masks,
    role_of,
    text_shares,
)
from library.log import UserError
from tests.generation_fixtures import (
    error,
    make_engine,
    make_job,
    options,
    picture,
    write_mask,
    write_network,
)

RED, GREEN, BLUE, BLACK, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (255, 255, 255)
YELLOW, MAGENTA, CYAN = (255, 255, 0), (255, 0, 255), (0, 255, 255)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("regions")


@pytest.fixture(scope="module")
def halves(folder: Path) -> str:
    """Left red, right green."""
    return write_mask(folder / "halves.png", [[RED, GREEN]])


@pytest.fixture(scope="module")
def networks(folder: Path) -> list[str]:
    return [write_network(folder / f"net{seed}.safetensors", seed=seed) for seed in (1, 2)]


# ---- masks


def test_channels_are_the_first_three_regions() -> None:
    pixels = np.array([[(255, 51, 0), (0, 255, 0)]], dtype=np.uint8)
    masks = region_masks(pixels, 5)
    torch.testing.assert_close(masks[:2, 0], torch.tensor([[1.0, 0.0], [0.2, 1.0]]))
    assert (masks[2:] == 1).all()  # an empty channel, and sub-prompts without one: the whole picture


def test_colour_codes_are_exact() -> None:
    colors = [RED, GREEN, YELLOW, BLUE, MAGENTA, CYAN, WHITE, BLACK, (254, 0, 255)]
    masks = region_masks(np.array([colors], dtype=np.uint8), 9, 8)
    assert torch.equal(masks[:8, 0], torch.eye(9)[:8])  # code 5 is (255, 0, 255) and not (254, 0, 255)
    assert (masks[8] == 1).all()
    assert (region_masks(np.array([[RED, BLUE]], dtype=np.uint8), 2, 2)[1] == 1).all()  # no green: everywhere


def test_codes_are_compared_before_resizing(tmp_path: Path) -> None:
    # halves of 33 and 31 pixels: resized first, the edge is a colour that is no code
    pixels = np.array([[RED] * 33 + [BLUE] * 31] * 64, dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "codes.png")
    masks = read_masks(str(tmp_path / "codes.png"), 4, 4)
    batch = RegionalBatch(masks[:, None], (), 1)
    small = batch.masks_at((8, 8), torch.zeros(1))[:, 0]
    torch.testing.assert_close(small[0] + small[3], torch.ones(8, 8))
    assert 0 < small[0, 0, 4] < 1


def test_masks_are_found_by_height_and_width_not_by_area() -> None:
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1
    batch = RegionalBatch(mask, (), 2)
    wide, tall = (batch.mask_for(0, torch.zeros(2, 3, *size))[0, 0] for size in ((2, 8), (8, 2)))
    assert wide.round().tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]] * 2
    assert tall.round().tolist() == [[1, 0]] * 8
    batch.place_hw = (2, 8)
    tokens = batch.mask_for(0, torch.zeros(2, 16, 5))
    assert tokens.shape == (2, 16, 1)
    assert torch.equal(tokens[1, :, 0], wide.flatten())
    assert batch.mask_for(0, torch.zeros(2, 7)).tolist() == [[0.5], [0.5]]  # no places: its share


def test_shares_sum_to_one() -> None:
    shares = text_shares(torch.tensor([[[1.0, 0.5, 0.0, 1.0]], [[0.0, 1.0, 0.0, 1.0]]]))
    torch.testing.assert_close(shares[:, 0], torch.tensor([[1, 1 / 3, 0.5, 0.5], [0, 2 / 3, 0.5, 0.5]]))


def test_a_mask_that_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "mask.png").write_text("no picture")
    with pytest.raises(UserError, match=r"--mask_path .*mask.png: .*; choose another picture"):
        read_masks(str(tmp_path / "mask.png"), 2, None)


def test_masks_are_read_as_all_pictures(tmp_path: Path) -> None:
    """Turned as EXIF says, what is transparent laid over white."""
    path, clear = tmp_path / "turned.png", tmp_path / "clear.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right: what was on the left is on top
    Image.fromarray(np.array([[RED] * 2 + [GREEN] * 2], dtype=np.uint8)).save(path, exif=exif)
    masks = read_masks(str(path), 2, None)
    assert masks[:, :, 0].tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    Image.fromarray(np.array([[(*RED, 255), (*RED, 0)]], dtype=np.uint8)).save(clear)
    assert read_masks(str(clear), 2, None)[:, 0].tolist() == [[1, 1], [0, 1]]


# ---- attention on toy tensors


class ToyCrossAttention(nn.Module):
    heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(4, 4, False), nn.Linear(3, 4, False), nn.Linear(3, 4, False)
        self.to_out = nn.ModuleList([nn.Linear(4, 4), nn.Identity()])


def attend(attn: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = (x.unflatten(-1, (2, 2)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("copies", [1, 2, 3])
@torch.no_grad()
def test_the_sum_rule_written_out(copies: int) -> None:
    torch.manual_seed(0)
    attn = ToyCrossAttention()
    hidden = torch.randn(copies, 4, 4)  # one picture, 2 x 2 places
    context = torch.randn(copies, 5, 3)
    texts = [torch.randn(1, 5, 3) for _ in range(2)]
    masks = torch.tensor([[1.0, 1.0, 0.5, 0.0], [0.0, 1.0, 1.0, 0.0]])
    regions = Regions(make_engine(), None)
    regions.now = RegionalBatch(masks.view(2, 1, 2, 2), texts, copies, place_hw=(2, 2))
    output = RegionalAttention(regions)(attn, hidden, context)

    def read(row: int, text: Tensor) -> Tensor:
        rows = hidden[row : row + 1]
        return attn.to_out[0](attend(attn, attn.to_q(rows), attn.to_k(text), attn.to_v(text)))

    prompt = 0 if copies == 1 else 1
    first, second = (read(prompt, text)[0] for text in texts)
    expected = torch.stack(
        [first[0], (first[1] + second[1]) / 2, (0.5 * first[2] + second[2]) / 1.5, (first[3] + second[3]) / 2]
    )
    torch.testing.assert_close(output[prompt], expected)
    for row in {0, 2} & set(range(copies)) - {prompt}:  # the negative and the empty prompt see their own text
        torch.testing.assert_close(output[row : row + 1], read(row, context[row : row + 1]))


def test_roles_of_layers() -> None:
    start = "down_blocks.0.attentions.1.transformer_blocks.0."
    assert role_of(start + "attn2.to_k") == role_of(start + "attn2.to_v") == "text"
    assert role_of(start + "attn2.to_out.0") == "output"
    for path in ("attn1.to_k", "attn1.to_out.0", "attn2.to_q", "ff.net.2"):
        assert role_of(start + path) == "place"


class Doubling(nn.Module):
    """A network whose difference is a constant, so that what becomes of it can be read off."""

    def __init__(self, delta: float) -> None:
        super().__init__()
        self.delta = delta

    def apply_to(self, layer: nn.Module) -> None:
        inner = layer.forward
        layer.forward = lambda x: inner(x) + self.delta


@torch.no_grad()
def test_two_networks_on_one_layer_act_in_their_own_region() -> None:
    engine = make_engine()
    unet: Any = engine.parts.unet
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    regions = Regions(engine, None)
    layers = {"place": block.ff.net[2], "text": block.attn2.to_k, "output": block.attn2.to_out[0]}
    inputs = {role: torch.randn(2, 4, layer.in_features) for role, layer in layers.items()}
    base = {role: layer(inputs[role]) for role, layer in layers.items()}
    for index, delta in enumerate((10.0, 100.0)):
        with regions.watch(index, "toy"):
            for layer in layers.values():
                Doubling(delta).apply_to(layer)
    assert sum("forward" in vars(module) for module in unet.modules()) == 3  # nothing is left on the others

    def added(role: str) -> list[float]:
        return (layers[role](inputs[role]) - base[role])[-1].mean(dim=-1).round(decimals=3).tolist()

    assert added("text") == [110.0] * 4  # without regions all is as usual
    masks = torch.tensor([[1.0, 1.0, 0.5, 0.0], [0.0, 1.0, 1.0, 0.0]]).view(2, 1, 2, 2)
    batch = regions.now = RegionalBatch(masks, (), 2, place_hw=(2, 2))
    assert added("place") == [10.0, 110.0, 105.0, 0.0]
    assert added("text") == added("output") == [0.0] * 4  # the negative prompt's text
    batch.part = 1
    assert added("text") == [100.0] * 4
    # times the sum of the masks, by which the average of the sub-prompts divides
    assert added("output") == [100.0, 200.0, 150.0, 0.0]


def test_a_network_that_changes_no_forward_is_refused() -> None:
    with pytest.raises(UserError, match="changes no layer's forward"), Regions(make_engine(), None).watch(0, "net.pt"):
        pass


# ---- what a line means


def lines(prompt: str, **told: Any) -> tuple[Shared, list[str]]:
    settings = options()
    from library.generation.jobs import defaults_of

    given = {**vars(defaults_of(settings, 64, 8)), **told}
    return settle(parse_line(prompt), Defaults(**given))


def test_and_without_a_mask_is_text_and_says_so() -> None:
    shared, notes = lines("a cat AND a dog")
    assert (shared.parts, shared.regional) == (1, False)
    assert len(notes) == 1
    assert "--mask_path" in notes[0]
    assert Job(0, "", "a AND b", "", 1, shared).texts == ("a AND b",)


def test_what_a_mask_means() -> None:
    two = {"has_masks": True, "network_multipliers": (1.0, 1.0)}
    assert [(s.parts, s.regional) for s, _ in (lines("a AND b", has_masks=True), lines("a AND b AND c", **two))] == [
        (2, True),
        (3, True),
    ]
    assert lines("a", has_masks=True)[0].regional is False
    assert lines("a", has_masks=True, network_multipliers=(1.0,))[0].regional is True
    # with a picture to begin from it is for inpainting
    assert lines("a", has_masks=True, has_sources=True, network_multipliers=(1.0,))[0].regional is False
    for prompt, says in (("a", "there is one"), ("a AND b", "there are 2")):
        with pytest.raises(UserError, match=f"need as many sub-prompts, joined by AND; {says}"):
            lines(prompt, has_masks=True, network_multipliers=(1.0, 1.0, 1.0))


def test_too_few_and_too_many_strengths_are_told() -> None:
    told = {"network_multipliers": (1.0, 1.0, 1.0)}
    shared, notes = lines("a --am 0.7,-0.2", **told)
    assert shared.multipliers == (0.7, -0.2, -0.2)
    assert "the last one is for the rest" in notes[0]
    shared, notes = lines("a --am 1,2,3,4", **told)
    assert shared.multipliers == (1, 2, 3)
    assert "the rest is ignored" in notes[0]


def test_a_job_with_regions_survives_the_picture_file() -> None:
    from dataclasses import asdict

    job = make_job("a AND b", mask="m.png", multipliers=(1.0, 0.5))
    assert job_from_json(asdict(job)) == job


# ---- pictures


def regional(*jobs: Job, files: list[str] | None = None, **values: Any) -> np.ndarray:
    engine = make_engine(values.pop("kind", "sd1"))
    attach_networks(engine, options(mask_path="m", network_weights=files, **values))
    return picture(engine, *jobs)


def test_one_text_everywhere_is_the_plain_picture(halves: str) -> None:
    plain = picture(make_engine(), make_job("a cat"))
    same = regional(make_job("a cat AND a cat", mask=halves))
    assert error(same, plain) < 1e-4


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize(("scale", "negative_scale"), [(1.0, None), (5.0, None), (5.0, 2.0)])
def test_each_text_changes_its_own_half(halves: str, kind: str, scale: float, negative_scale: float | None) -> None:
    seen: list[Tensor] = []

    def one_call(prompt: str) -> Tensor:
        engine = make_engine(kind)
        attach_networks(engine, options(mask_path="m"))
        job = make_job(prompt, mask=halves, steps=2, scale=scale, negative_scale=negative_scale)
        unet: Any = engine.parts.unet
        attn = unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2
        handle = attn.register_forward_hook(lambda module, inputs, output: seen.append(output))
        engine.draw_latents([job])
        handle.remove()
        assert type(attn.processor).__name__ == "AttnProcessor2_0"  # put back
        output = seen[0]  # of the first step
        seen.clear()
        row = output[0 if scale == 1 else 1]
        side = int(len(row) ** 0.5)
        return row.unflatten(0, (side, side))

    base, other = one_call("a cat AND a dog"), one_call("a cat AND the blue sea")
    change = (other - base).abs().mean(dim=-1)
    width = change.shape[1]
    # the first layers have seen nothing of the other half yet but through convolutions and attention
    assert change[:, width // 2 :].mean() > 3 * change[:, : width // 2].mean()


def test_networks_in_all_ways_of_guidance(halves: str, networks: list[str]) -> None:
    plain = regional(make_job("a cat AND a dog", mask=halves))
    for scale, negative_scale in ((1.0, None), (5.0, None), (5.0, 2.0)):
        shared: dict[str, Any] = {"scale": scale, "negative_scale": negative_scale}
        jobs = [make_job("a cat AND a dog", mask=halves, multipliers=m, **shared) for m in ((1.0, 1.0), (0.0, 0.0))]
        engine = make_engine()
        attach_networks(engine, options(mask_path="m", network_weights=networks))
        strong, off, again = (picture(engine, job) for job in (jobs[0], jobs[1], jobs[0]))
        assert error(strong, off) > 0.02
        assert np.array_equal(strong, again)  # nothing of the batch between is left
        if (scale, negative_scale) == (5.0, None):
            assert error(off, plain) < 1e-5


def test_four_networks_and_sub_prompts_without_one(folder: Path, halves: str, networks: list[str]) -> None:
    files = [*networks, *networks]
    text = "a cat AND a dog AND a bird AND a fish AND the sea"
    result = regional(make_job(text, mask=halves, multipliers=(0.3,) * 4), files=files)
    fewer = regional(make_job(text.rpartition(" AND ")[0], mask=halves, multipliers=(0.3,) * 4), files=files)
    assert error(result, fewer) > 1e-3  # the fifth counts too


def test_a_whole_region_is_the_network_everywhere_but_in_the_negative_text(folder: Path, networks: list[str]) -> None:
    whole = write_mask(folder / "whole.png", [[RED]])
    file = write_network(folder / "unet.safetensors", only="unet")
    divided = regional(make_job("a cat", mask=whole, multipliers=(0.7,), scale=1.0), files=[file])
    engine = make_engine()
    attach_networks(engine, options(network_weights=[file]))
    plain = picture(engine, make_job("a cat", multipliers=(0.7,), scale=1.0))
    assert error(divided, plain) < 1e-4


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_text_encoders_of_a_network_change_their_own_sub_prompt_only(folder: Path, halves: str, kind: str) -> None:
    file = write_network(folder / f"{kind}_te.safetensors", kind, only="text_encoder")
    engine = make_engine(kind)
    attach_networks(engine, options(mask_path="m", network_weights=[file]))
    plain = make_engine(kind)
    shared = make_job("a AND b", mask=halves, multipliers=(1.0,)).shared
    for part, changed in ((0, True), (1, False), (None, False)):
        ours = engine.encode((["a cat"], shared.for_text(part)))[0]
        base = plain.encode((["a cat"], Shared(64, 64, 3, "ddim", 5.0)))[0]
        assert (error(ours.hidden_BTD.numpy(), base.hidden_BTD.numpy()) > 1e-3) == changed


def test_sdxl_is_told_the_pooled_text_of_the_last_sub_prompt(halves: str) -> None:
    engine = make_engine("sdxl")
    attach_networks(engine, options(mask_path="m"))
    condition = engine.condition([make_job("a cat AND a dog", mask=halves)])
    expected = engine.encode((["blurry", "a dog"], make_job("a").shared))[0]
    assert condition.pooled_BP is not None
    assert expected.pooled_BP is not None
    assert torch.equal(condition.pooled_BP, expected.pooled_BP)


def test_each_picture_of_a_batch_has_its_own_mask(folder: Path, halves: str) -> None:
    swapped = write_mask(folder / "swapped.png", [[GREEN, RED]])
    jobs = [make_job("a cat AND a dog", mask=mask) for mask in (halves, swapped)]
    together = regional(*jobs)
    assert error(together, np.concatenate([regional(job) for job in jobs])) < 1e-4
    assert error(together[0], together[1]) > 1e-3


def test_odd_sizes_and_all_layers(folder: Path, networks: list[str]) -> None:
    quarters = write_mask(folder / "quarters.png", [[RED, GREEN], [BLUE, YELLOW]])
    file = write_network(folder / "conv.safetensors", conv_dim="2")
    job = make_job("a AND b AND c AND d", mask=quarters, multipliers=(0.5, 0.5), width=72, height=104)
    result = regional(job, files=[networks[0], file], network_regional_mask_max_color_codes=4)
    assert result.shape == (1, 104, 72, 3)
    assert np.isfinite(result).all()


def test_folding_is_off_with_regions(halves: str, networks: list[str], caplog: pytest.LogCaptureFixture) -> None:
    job = make_job("a cat AND a dog", mask=halves, multipliers=(1.0, 1.0))
    with caplog.at_level(logging.WARNING):
        folded = regional(job, files=networks, network_pre_calc=True)
    assert "--network_pre_calc does nothing with --mask_path" in caplog.text
    assert np.array_equal(folded, regional(job, files=networks))


def test_other_batches_are_left_alone(halves: str) -> None:
    engine = make_engine()
    attach_networks(engine, options(mask_path="m"))
    before = picture(engine, make_job("a cat"))
    picture(engine, make_job("a cat AND a dog", mask=halves))
    hooks = [module for module in engine.parts.unet.modules() if module._forward_pre_hooks]
    assert np.array_equal(picture(engine, make_job("a cat")), before)
    assert hooks == []


def test_what_goes_wrong_while_drawing_leaves_nothing(halves: str) -> None:
    engine = make_engine()
    attach_networks(engine, options(mask_path="m"))

    def broken(setup: Setup) -> Any:
        raise UserError("broken")

    engine.extensions.append(broken)
    with pytest.raises(UserError, match="broken"):
        picture(engine, make_job("a cat AND a dog", mask=halves))
    engine.extensions.pop()
    assert error(picture(engine, make_job("a cat")), picture(make_engine(), make_job("a cat"))) == 0
