"""Deep Shrink: which block is small at which timestep, the sizes of the decoder, and that nothing stays behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from library.generation.deep_shrink import Shrinking, attach_deep_shrink, places_of
from library.generation.engine import Engine
from library.generation.jobs import DeepShrink
from tests.generation.engines import job, toy_engine

ENGINES = {family: toy_engine(family) for family in ("sd1", "sd2", "sdxl")}
ALL_THE_TIME = DeepShrink(1, 0, None, 0, 0.5)


def shrinking_engine(family: str) -> Engine:
    engine = ENGINES[family]
    engine.extensions.clear()
    attach_deep_shrink(engine)
    return engine


class Watched:
    """Notes the sizes of what enters and leaves modules of a U-Net while it is drawn with."""

    def __init__(self, unet: nn.Module, *paths: str) -> None:
        self.entering: dict[str, list[tuple[int, int]]] = {path: [] for path in paths}
        self._handles = [
            unet.get_submodule(path).register_forward_pre_hook(self._note(path), with_kwargs=True) for path in paths
        ]

    def _note(self, path: str) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden: Tensor = args[0] if args else kwargs["hidden_states"]
            self.entering[path].append((hidden.shape[2], hidden.shape[3]))

        return note

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()


def sizes(family: str, plan: DeepShrink | None, *paths: str, **shared: Any) -> dict[str, list[tuple[int, int]]]:
    engine = shrinking_engine(family)
    watched = Watched(engine.parts.unet, *paths)
    try:
        engine.draw([job(deep_shrink=plan, **shared)])
    finally:
        watched.stop()
    return watched.entering


def test_places() -> None:
    sd = places_of(ENGINES["sd1"].parts.unet)
    assert sd == {level: f"down_blocks.{level}.resnets.0" for level in range(4)}
    assert places_of(ENGINES["sdxl"].parts.unet) == {
        0: "conv_in",
        1: "down_blocks.0.resnets.0",
        2: "down_blocks.0.resnets.1",
        3: "down_blocks.0.downsamplers.0",
        4: "down_blocks.1.resnets.0",
        5: "down_blocks.1.resnets.1",
        6: "down_blocks.1.downsamplers.0",
        7: "down_blocks.2.resnets.0",
        8: "down_blocks.2.resnets.1",
    }


@given(st.integers(0, 999), st.integers(0, 1000), st.integers(0, 1000))
def test_which_depth_at_which_timestep(timestep: int, first: int, second: int) -> None:
    shrinking = Shrinking(DeepShrink(3, first, 2, second, 0.5), {2: "a", 3: "b"})
    expected = 3 if timestep >= first else 2 if timestep >= second else None
    assert shrinking.depth_at(timestep) == expected


def test_a_block_is_small_while_the_timestep_is_high() -> None:
    """5 steps of ddim: timesteps 801, 601, 401, 201, 1."""
    plan = DeepShrink(2, 600, 1, 200, 0.5)
    paths = (
        "down_blocks.1.resnets.0.conv1",
        "down_blocks.2.resnets.0.conv1",
        "up_blocks.3.resnets.2.conv1",
        "conv_out",
    )
    found = sizes("sd1", plan, *paths, sampler="ddim", width=128, height=192)
    assert found["down_blocks.2.resnets.0.conv1"] == [(3, 2)] * 2 + [(3, 2)] * 2 + [(6, 4)]
    assert found["down_blocks.1.resnets.0.conv1"] == [(12, 8)] * 2 + [(6, 4)] * 2 + [(12, 8)]
    assert found["up_blocks.3.resnets.2.conv1"] == found["conv_out"] == [(24, 16)] * 5


@pytest.mark.parametrize("family", ENGINES)
@pytest.mark.parametrize("ratio", [0.5, 0.35])
@pytest.mark.parametrize("size", [(128, 128), (96, 160)])
def test_every_depth_draws_a_picture(family: str, ratio: float, size: tuple[int, int]) -> None:
    engine = shrinking_engine(family)
    common = {"width": size[0], "height": size[1], "steps": 2}
    plain = engine.draw([job(**common)])
    seen = [plain]
    for depth in places_of(engine.parts.unet):
        pictures = engine.draw([job(deep_shrink=DeepShrink(depth, 0, None, 0, ratio), **common)])
        assert pictures.shape == plain.shape
        assert bool(pictures.isfinite().all())
        assert all((pictures - other).abs().max() > 1e-4 for other in seen)  # each depth is another picture
        seen.append(pictures)
    assert torch.equal(engine.draw([job(**common)]), plain)


def test_it_is_what_a_small_input_gives_where_all_is_small() -> None:
    """At depth 0 of SDXL the whole U-Net works at the small size: so it equals the U-Net on small latents."""
    unet = ENGINES["sdxl"].parts.unet
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    extra = {"text_embeds": torch.zeros(1, 48), "time_ids": torch.zeros(1, 6)}
    rest = (torch.tensor([900]), torch.zeros(1, 77, 96), None, None, None, None, extra)
    small = torch.nn.functional.interpolate(latents, (8, 8), mode="bicubic")
    before: list[Tensor] = []
    handle = unet.conv_norm_out.register_forward_pre_hook(lambda _, args: before.append(args[0]))
    shrinking = Shrinking(DeepShrink(0, 0, None, 0, 0.5), places_of(unet), depth=0)
    with torch.no_grad(), shrinking.hooked(unet):
        shrunk = unet(latents, *rest).sample
    handle.remove()
    handle = unet.conv_norm_out.register_forward_pre_hook(lambda _, args: before.append(args[0]))
    with torch.no_grad():
        unet(small, *rest)
    handle.remove()
    assert shrunk.shape == latents.shape
    assert torch.allclose(before[0], before[1], atol=1e-5)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_residuals_of_a_control_net_still_count(family: str) -> None:
    unet = ENGINES[family].parts.unet
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    width = 96 if family == "sdxl" else 32
    extra = {"text_embeds": torch.zeros(2, 48), "time_ids": torch.zeros(2, 6)} if family == "sdxl" else None
    rest = (torch.tensor([900, 900]), torch.zeros(2, 77, width), None, None, None, None, extra)
    skips: list[Tensor] = []

    def note(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        skips[:0] = list(kwargs["res_hidden_states_tuple"])

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in unet.up_blocks]
    middle: list[Tensor] = []
    handles.append(unet.mid_block.register_forward_hook(lambda _, args, output: middle.append(output)))
    with torch.no_grad():
        unet(latents, *rest)
    for handle in handles:
        handle.remove()

    def residuals(strength: float) -> dict[str, Any]:
        made = [strength * torch.ones_like(skip) for skip in skips]
        return {
            "down_block_additional_residuals": made,
            "mid_block_additional_residual": strength * torch.ones_like(middle[0]),
        }

    shrinking = Shrinking(ALL_THE_TIME, places_of(unet), depth=1)
    with torch.no_grad():
        plain = unet(latents, *rest, **residuals(0.3)).sample
        with shrinking.hooked(unet):
            without = unet(latents, *rest).sample
            none = unet(latents, *rest, **residuals(0.0)).sample
            some = unet(latents, *rest, **residuals(0.3)).sample
            shrinking.depth = None
            assert torch.equal(unet(latents, *rest, **residuals(0.3)).sample, plain)  # not shrunk: as ever
        assert torch.equal(unet(latents, *rest, **residuals(0.3)).sample, plain)
    assert torch.equal(none, without)
    assert (some - without).abs().max() > 1e-3


def test_nothing_stays_when_a_batch_fails() -> None:
    engine = shrinking_engine("sd1")
    plain = engine.draw([job()])

    def fail() -> None:
        raise KeyboardInterrupt

    engine.on_progress = fail
    with pytest.raises(KeyboardInterrupt):
        engine.draw([job(deep_shrink=ALL_THE_TIME)])
    engine.on_progress = lambda: None
    assert torch.equal(engine.draw([job()]), plain)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in engine.parts.unet.modules())


def test_a_depth_that_is_not_there_does_nothing(caplog: pytest.LogCaptureFixture) -> None:
    engine = shrinking_engine("sd1")
    assert torch.equal(engine.draw([job(deep_shrink=DeepShrink(7, 0, None, 0, 0.5))]), engine.draw([job()]))
    assert "no depth 7, only 0 to 3" in caplog.text
