"""Networks in generation: which file is read how, ways of putting it in, strengths that stay with their picture."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from library.generation.networks import LYCORIS, PLAIN_LORA, attach_networks, read_requests
from library.log import UserError
from library.options.generation import GenNetworkOptions
from tests.generation_fixtures import error, make_engine, make_job, options, picture, toy_model, write_network


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("networks")


@pytest.fixture(scope="module")
def first(folder: Path) -> str:
    return write_network(folder / "first.safetensors", seed=1)


@pytest.fixture(scope="module")
def second(folder: Path) -> str:
    return write_network(folder / "second.safetensors", seed=2, conv_dim="2")


def drawn(*jobs: Any, **values: Any) -> np.ndarray:
    engine = make_engine()
    attach_networks(engine, options(**values))
    return np.concatenate([picture(engine, job) for job in jobs])


def replaced_forwards(module: nn.Module) -> int:
    return sum("forward" in vars(child) for child in module.modules())


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_merged_folded_and_live_draw_the_same(folder: Path, kind: str) -> None:
    files = [write_network(folder / f"{kind}{seed}.safetensors", kind, seed) for seed in (1, 2)]
    pictures: list[np.ndarray] = []
    ways: list[tuple[dict[str, Any], list[float]]] = [
        ({}, [0.8, -0.5]),
        ({"network_merge": True}, []),
        ({"network_merge_n_models": 1}, [-0.5]),
        ({"network_pre_calc": True}, [0.8, -0.5]),
    ]
    for way, still_live in ways:
        engine = make_engine(kind)
        live = attach_networks(engine, options(network_weights=files, network_mul=[0.8, -0.5], **way))
        assert [network.multiplier for network in live] == still_live
        job = make_job("a cat", multipliers=tuple(network.multiplier for network in live))
        pictures.append(picture(engine, job))
    assert error(picture(make_engine(kind), make_job("a cat")), pictures[0]) > 0.02
    for other in pictures[1:]:
        assert error(other, pictures[0]) < 1e-4


def test_after_merging_nothing_per_step_is_left(first: str, second: str) -> None:
    engine = make_engine()
    assert attach_networks(engine, options(network_weights=[first, second], network_merge=True)) == ()
    assert [replaced_forwards(module) for module in engine.parts.modules()] == [0, 0, 0]
    folded = make_engine()
    attach_networks(folded, options(network_weights=[first, second], network_pre_calc=True))
    assert [replaced_forwards(module) for module in folded.parts.modules()] == [0, 0, 0]
    live = make_engine()
    attach_networks(live, options(network_weights=[first]))
    assert replaced_forwards(live.parts.unet) == 192  # the count sees what it is to see


@pytest.mark.parametrize("way", [{}, {"network_pre_calc": True}])
def test_strengths_belong_to_a_picture(first: str, second: str, way: dict[str, Any]) -> None:
    jobs = [make_job("a cat", multipliers=m) for m in ((1.0, 0.5), (0.0, 0.0), (-0.5, 1.0), (1.0, 0.5))]
    together = drawn(*jobs, network_weights=[first, second], **way)
    apart = np.concatenate([drawn(job, network_weights=[first, second], **way) for job in jobs])
    assert np.array_equal(together, apart)
    assert np.array_equal(together[0], together[3])
    assert error(together[0], together[2]) > 0.02
    assert np.array_equal(together[1], picture(make_engine(), make_job("a cat"))[0])


def test_folding_happens_only_when_strengths_change(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    (live,) = attach_networks(engine, options(network_weights=[first], network_pre_calc=True))
    calls: list[str] = []
    fold = live.network.pre_calculation
    monkeypatch.setattr(live.network, "pre_calculation", lambda: (calls.append("fold"), fold()))
    before = engine.parts.unet.conv_in.weight.clone()
    for text in ("a cat", "a dog", "a bird"):
        picture(engine, make_job(text, multipliers=(1.0,)))
    assert calls == ["fold"]
    picture(engine, make_job("a cat", multipliers=(0.5,)))
    assert calls == ["fold", "fold"]
    assert torch.equal(engine.parts.unet.conv_in.weight, before)


def test_text_is_encoded_once_for_each_strength(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    attach_networks(engine, options(network_weights=[first]))
    seen: list[str] = []
    encode = engine._encode
    monkeypatch.setattr(
        engine, "_encode", lambda captions, shared: (seen.extend(captions), encode(captions, shared))[1]
    )
    for multiplier in (1.0, 1.0, 0.5):
        picture(engine, make_job("a cat", multipliers=(multiplier,)))
    assert seen == ["blurry", "a cat"] * 2


# ---- what is asked for


def requests(**values: Any) -> list[Any]:
    return read_requests(GenNetworkOptions(**values))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"network_module": ["networks.lora"]}, "--network_module has 1 value for 0 files of --network_weights"),
        ({"network_mul": [0.5]}, "--network_mul has 1 value for 0 files"),
        ({"network_weights": ["gone.safetensors"]}, "gone.safetensors: there is no such file"),
        ({"two": True, "network_module": ["networks.lora"]}, "--network_module has 1 value for 2 files"),
        ({"two": True, "network_mul": [1.0, 2.0, 3.0]}, "--network_mul has 3 values for 2 files"),
        ({"two": True, "network_args": ["a=1", "b=2", "c=3"]}, "--network_args has 3 values for 2 files"),
        ({"two": True, "network_args": ["a"]}, "'a' must have the form key=value"),
        ({"two": True, "network_args": ['a="b;c']}, "a quotation mark is not closed"),
        ({"two": True, "network_args": ["a=1;a=2"]}, "a is given twice"),
    ],
)
def test_lists_that_do_not_fit_are_errors(first: str, second: str, values: dict[str, Any], says: str) -> None:
    if values.pop("two", False):
        values["network_weights"] = [first, second]
    with pytest.raises(UserError) as caught:
        requests(**values)
    assert says in str(caught.value)


def test_missing_strengths_and_arguments_have_defaults(first: str, second: str) -> None:
    one, two = requests(
        network_weights=[first, second], network_mul=[0.5], network_args=['block_dims=1,2; x="a=b;c=d" ;y==']
    )
    assert (one.multiplier, two.multiplier) == (0.5, 1.0)
    assert (one.arguments, two.arguments) == ({"block_dims": "1,2", "x": "a=b;c=d", "y": "="}, {})


@pytest.mark.parametrize(
    ("tensors", "metadata", "asked", "module"),
    [
        (("lora_down.weight", "lora_up.weight"), {"ss_network_module": "networks.dylora"}, None, PLAIN_LORA),
        (("lora_down.weight", "lora_up.weight"), {}, "networks.dylora", "networks.dylora"),
        (("lora_down.weight", "lora_up.weight"), {"ss_network_module": "os"}, None, PLAIN_LORA),
        (("on_input", "weight"), {}, None, LYCORIS),
        (("hada_w1_a",), {}, "my.module", "my.module"),
    ],
)
def test_a_file_says_what_reads_it(
    tmp_path: Path, tensors: tuple[str, ...], metadata: dict[str, str], asked: str | None, module: str
) -> None:
    file = str(tmp_path / "net.safetensors")
    save_file({f"lora_unet_x.{name}": torch.zeros(2, 2) for name in tensors}, file, metadata)
    (request,) = requests(network_weights=[file], network_module=asked and [asked])
    assert request.module == module


@pytest.mark.parametrize("merge", [False, True])
def test_a_file_whose_layers_have_other_sizes_is_refused_in_one_line(folder: Path, merge: bool) -> None:
    """Layers of SD 1.x and 2.x have the same names."""
    other = write_network(folder / "of_sd2.safetensors", "sd2")
    with pytest.raises(UserError) as caught:
        attach_networks(make_engine(), options(network_weights=[other], network_merge=merge))
    assert str(caught.value) == f"{other}: its layers are of other sizes than this model's; it was made for another one"


def test_a_file_for_another_model_is_refused_and_a_partly_fitting_one_told(
    folder: Path, first: str, caplog: pytest.LogCaptureFixture
) -> None:
    other = write_network(folder / "of_sdxl.safetensors", "sdxl")
    for way in ({}, {"network_merge": True}):
        with pytest.raises(UserError, match=r"of_sdxl.* none of its \d+ layers exists in this model"):
            attach_networks(make_engine(), options(network_weights=[other], **way))
    tensors = {key: value for key, value in load_file(first).items() if key.startswith("lora_unet")}
    odd = {key.replace("lora_unet_", "lora_unet_control_"): value.clone() for key, value in list(tensors.items())[:3]}
    save_file({**tensors, **odd}, folder / "mixed.safetensors")
    with caplog.at_level(logging.WARNING):
        mixed = drawn(make_job("a cat", multipliers=(1.0,)), network_weights=[str(folder / "mixed.safetensors")])
    assert "1 of its 193 layers do not exist in this model and are left out" in caplog.text
    save_file(tensors, folder / "clean.safetensors")
    clean = drawn(make_job("a cat", multipliers=(1.0,)), network_weights=[str(folder / "clean.safetensors")])
    assert np.array_equal(mixed, clean)


def test_more_to_merge_than_there_is(first: str) -> None:
    with pytest.raises(UserError, match="--network_merge_n_models 2: there are only 1"):
        attach_networks(make_engine(), options(network_weights=[first], network_merge_n_models=2))


def test_wrong_arguments_and_modules_are_one_line(first: str) -> None:
    for values, says in [
        ({"network_args": ["nonsense=1"]}, "nonsense"),
        ({"network_module": ["networks.gone"]}, "there is no module networks.gone"),
        ({"network_module": ["json"]}, "has no create_network"),
    ]:
        with pytest.raises(UserError) as caught:
            attach_networks(make_engine(), options(network_weights=[first], **values))
        assert says in str(caught.value)


def test_parts_and_blocks_can_have_strengths_of_their_own(folder: Path, first: str) -> None:
    def strong(arguments: str, **values: Any) -> np.ndarray:
        return drawn(
            make_job("a cat", multipliers=() if values else (0.5,)),
            **{"network_weights": [first], "network_mul": [0.5], "network_args": [arguments], **values},
        )

    # halves as files of their own
    tensors = load_file(first)
    for part, start in (("text", "lora_te"), ("unet", "lora_unet"), ("middle", "lora_unet_mid")):
        save_file(
            {key: value for key, value in tensors.items() if key.startswith(start)}, folder / f"{part}.safetensors"
        )
    middle = ",".join("1" if block == 12 else "0" for block in range(25))
    for arguments, part in (
        ("unet_mul=0", "text"),
        ("text_encoder_mul=0", "unet"),
        (f"text_encoder_mul=0;block_mul={middle}", "middle"),
    ):
        other = str(folder / f"{part}.safetensors")
        expected = drawn(make_job("a cat", multipliers=(0.5,)), network_weights=[other])
        assert error(strong(arguments), expected) < 1e-5
        assert error(strong(arguments, network_merge=True), expected) < 1e-5
    assert error(strong("unet_mul=0"), strong("text_encoder_mul=0")) > 1e-2
    for arguments, says in (("block_mul=1,2", "needs 25 values, has 2"), ("unet_mul=x", "must be a number")):
        with pytest.raises(UserError, match=says):
            strong(arguments)


def test_metadata_is_shown(first: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        attach_networks(make_engine(), options(network_weights=[first], network_show_meta=True))
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("metadata of")]
    shown = json.loads(line[line.index("{") :])
    assert shown["ss_network_module"] == "networks.lora"
    assert "sshs_model_hash" in shown


def test_strengths_for_other_networks_are_refused(first: str) -> None:
    engine = make_engine()
    attach_networks(engine, options(network_weights=[first]))
    with pytest.raises(UserError, match="2 strengths for 1 networks"):
        picture(engine, make_job("a cat", multipliers=(1.0, 0.5)))


# ---- networks of others


@pytest.mark.parametrize("mask", [False, True])
def test_lycoris_draws_through_the_protocol(tmp_path: Path, mask: bool) -> None:
    kohya = pytest.importorskip("lycoris.kohya")
    engine = make_engine()
    views = engine.family.adapter_views(toy_model())
    encoder = views.text_encoders[0]
    network = kohya.create_network(1.0, 4, 1.0, None, encoder, views.unet, algo="loha", preset="attn-mlp")
    network.apply_to(encoder, views.unet, True, True)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    file = str(tmp_path / "loha.safetensors")
    network.save_weights(file, torch.float32, {})
    values: dict[str, Any] = {"mask_path": "mask.png"} if mask else {}  # no picture is read before it is drawn
    (live,) = attach_networks(engine, options(network_weights=[file], network_module=[LYCORIS], **values))
    plain = picture(make_engine(), make_job("a cat"))
    full = picture(engine, make_job("a cat", multipliers=(1.0,)))
    half = picture(engine, make_job("a cat", multipliers=(0.5,)))
    off = picture(engine, make_job("a cat", multipliers=(0.0,)))
    assert type(live.network).__module__.startswith("lycoris")
    assert error(full, plain) > error(half, plain) > 1e-3
    assert error(off, plain) < 1e-5
