"""Network files: the reference's golden file, hashes, casts, names of Diffusers and PEFT, files of other kinds."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.checkpoint.inspection import check_network_file
from library.checkpoint.io import open_model_file, read_header
from library.log import UserError
from networks import lora
from networks.check_lora_weights import main as check_main
from networks.kinds import read_network
from networks.resize_lora import main as resize_main
from networks.weights import read_weights, to_weight_table, write_weights
from tests.networks_fixtures import make_clip, make_unet, randomise, toy_models

GOLDEN = Path(__file__).parent.parent / "golden" / "data" / "lora_sd1_narrow.safetensors"


def test_golden_file_is_built_loaded_and_written_again(tmp_path: Path) -> None:
    encoder, unet = make_clip(64, 12, 256), make_unet((32, 64, 64, 64), 64)
    network, _ = lora.create_network_from_weights(1.0, str(GOLDEN), None, encoder, unet)
    assert (network.count("text_encoder"), network.count("unet")) == (72, 192)
    network.apply_to(encoder, unet)
    report = network.load_weights(str(GOLDEN))
    assert report.loaded == 264
    assert (network.network_dim, network.network_alpha) == ("4", "1.0")
    _, metadata = read_header(GOLDEN)
    plain = {key: value for key, value in metadata.items() if not key.startswith("sshs_")}
    network.save_weights(str(tmp_path / "again.safetensors"), None, plain)
    infos, written = read_header(tmp_path / "again.safetensors")
    assert infos == read_header(GOLDEN)[0]
    # the same bytes as the reference wrote, by its own hash of them
    assert written["sshs_model_hash"] == metadata["sshs_model_hash"]
    assert written == metadata
    check = check_network_file(GOLDEN)
    assert (check.modules, dict(check.ranks), check.problems) == (264, {4: 264}, [])


def test_hashes_are_those_of_the_bytes_written(tmp_path: Path) -> None:
    tensors = {f"lora_unet_{n}.lora_up.weight": torch.randn(1000, 64 + n) for n in range(12)}
    for dtype in (None, torch.float16, torch.bfloat16):
        path = tmp_path / "net.safetensors"
        write_weights(path, tensors, dtype, {"ss_x": "é"})
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        assert metadata["sshs_model_hash"] == hashlib.sha256(data[8 + length :]).hexdigest()
        assert metadata["sshs_legacy_hash"] == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "ckpt"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_tensor_is_cast_alpha_too(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    encoder, unet = toy_models()
    network = lora.create_network(1.0, 4, 3.0, None, encoder, unet)
    network.apply_to(encoder, unet)
    path = tmp_path / f"net.{suffix}"
    network.save_weights(str(path), dtype, {"ss_x": "1"})
    with open_model_file(path) as file:
        assert {file.tensor(key).dtype for key in file.infos} == {dtype}
        assert set(file.infos) == set(network.state_dict())
        assert file.tensor("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha").shape == ()
    assert read_weights(path).flat().keys() == network.state_dict().keys()


def test_missing_alpha_is_the_rank() -> None:
    encoder, unet = toy_models()
    tensors = {
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(2, 64, 1, 1),
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.ones(64, 2, 1, 1),
    }
    network, weights = lora.create_network_from_weights(1.0, None, None, encoder, unet, weights_sd=tensors)
    assert len(network.adapters) == 1
    before = unet.mid_block.attentions[0].proj_in.weight.clone()
    network.merge_to(encoder, unet, weights, torch.float32, "cpu")
    torch.testing.assert_close(unet.mid_block.attentions[0].proj_in.weight, before + 2)


FORMS = {
    "PEFT": (
        "unet.{u}.lora_A.weight",
        "unet.{u}.lora_B.weight",
        "text_encoder.{t}.lora_A.weight",
        "text_encoder.{t}.lora_B.weight",
    ),
    "named PEFT adapter": (
        "unet.{u}.lora_A.default.weight",
        "unet.{u}.lora_B.default.weight",
        "text_encoder.{t}.lora_A.default.weight",
        "text_encoder.{t}.lora_B.default.weight",
    ),
    "old Diffusers": (
        "unet.{u}.lora.down.weight",
        "unet.{u}.lora.up.weight",
        "text_encoder.{t}.lora_linear_layer.down.weight",
        "text_encoder.{t}.lora_linear_layer.up.weight",
    ),
    "attention processors": (
        "unet.{a}.processor.to_q_lora.down.weight",
        "unet.{a}.processor.to_q_lora.up.weight",
        "text_encoder.{t}.lora_linear_layer.down.weight",
        "text_encoder.{t}.lora_linear_layer.up.weight",
    ),
    "bare PEFT model": ("base_model.model.{u}.lora_A.weight", "base_model.model.{u}.lora_B.weight"),
}


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("wrapped", [True, False])
def test_names_of_diffusers_and_peft(form: str, wrapped: bool) -> None:
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1"
    text = f"{'text_model.' if wrapped else ''}encoder.layers.1.self_attn.out_proj"
    down, up = torch.randn(2, 8), torch.randn(8, 2)
    keys = [key.format(u=f"{attention}.to_q", a=attention, t=text) for key in FORMS[form]]
    table = to_weight_table(dict(zip(keys, (down, up, down, up), strict=False)), "file")
    expected = {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"}
    expected |= {"lora_te_text_model_encoder_layers_1_self_attn_out_proj"} if len(keys) == 4 else set()
    assert set(table.modules) == expected
    for tensors in table.modules.values():
        assert torch.equal(tensors["lora_down.weight"], down)
        assert torch.equal(tensors["lora_up.weight"], up)


def test_alpha_of_peft_configuration() -> None:
    path = "mid_block.attentions.0.proj_in"
    tensors = {f"unet.{path}.lora_A.weight": torch.ones(4, 8), f"unet.{path}.lora_B.weight": torch.ones(8, 4)}
    name = f"lora_unet_{path.replace('.', '_')}"

    def alpha(config: dict[str, object]) -> float:
        metadata = {"lora_adapter_metadata": json.dumps(config)}
        table = to_weight_table(tensors, "file", metadata)
        return lora.LoraAdapter.size_of(table.modules[name]).alpha

    assert alpha({"unet.r": 4, "unet.lora_alpha": 8}) == 8
    assert alpha({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attentions.0.proj_in": 2}}) == 2
    assert alpha({"unet.lora_alpha": 8, "unet.use_rslora": True}) == 16
    assert alpha({}) == 0  # nothing said: the rank


@pytest.mark.parametrize("key", ["unet.x.on_input", "model.diffusion_model.out.0.weight"])
def test_files_that_are_no_networks(tmp_path: Path, key: str) -> None:
    path = tmp_path / "other.safetensors"
    save_file({key: torch.ones(2, 2)}, path)
    with pytest.raises(UserError, match="no key of a LoRA file") as caught:
        read_weights(path)
    assert str(path) in str(caught.value)


def test_words_that_are_bundled_with_a_network_are_told_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """OneTrainer writes them, web UIs read them."""
    path = tmp_path / "both.safetensors"
    pair = {f"lora_unet_mid_block_x.lora_{end}.weight": torch.ones(2, 2) for end in ("down", "up")}
    save_file({**pair, "bundle_emb.sks.emb_params": torch.ones(1, 4)}, path)
    assert read_weights(path).modules.keys() == {"lora_unet_mid_block_x"}
    assert "the words that are bundled with it are left out: sks" in caplog.text


def test_modules_of_no_known_kind_are_named_with_their_maker(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"lora_unet_x.on_input": torch.ones(2)}, path, {"ss_network_module": "lycoris.kohya"})
    with pytest.raises(UserError, match=r"of a kind that is not known here \(on_input\).*lycoris\.kohya"):
        read_network(path)


@pytest.mark.parametrize(
    "tensors",
    [
        {"lora_down.weight": (4, 8), "lora_up.weight": (8, 3)},
        {"lora_down.weight": (4,), "lora_up.weight": (8,)},
        {"lora_down.weight": (), "lora_up.weight": ()},
        {"lora_down.weight": (0, 8), "lora_up.weight": (8, 0)},
        {"lora_down.weight": (4, 8), "lora_up.weight": (8, 4), "alpha": (3,)},
        {"hada_w1_a": (8, 4), "hada_w1_b": (4,), "hada_w2_a": (8, 4), "hada_w2_b": (4, 8)},
    ],
)
def test_tensors_that_fit_no_layer_are_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tensors: dict[str, tuple[int, ...]]
) -> None:
    path = tmp_path / "damaged.safetensors"
    save_file({f"lora_unet_mid_block_x.{name}": torch.ones(shape) for name, shape in tensors.items()}, path)
    assert check_main([str(path)]) == 1
    assert resize_main(["--model", str(path), "--save_to", str(tmp_path / "out.safetensors")]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert all("damaged" in line and "lora_unet_mid_block_x" in line for line in errors)


def test_8_bit_floats_are_read_as_numbers(tmp_path: Path) -> None:
    path, out = tmp_path / "eight.safetensors", tmp_path / "out.safetensors"
    pair = {f"lora_unet_mid_block_x.lora_{end}.weight": torch.eye(4).to(torch.float8_e4m3fn) for end in ("down", "up")}
    save_file(pair, path)
    assert check_main([str(path)]) == 0
    assert resize_main(["--model", str(path), "--save_to", str(out)]) == 0
    (own,) = read_weights(out).modules.values()
    torch.testing.assert_close(own["lora_up.weight"] @ own["lora_down.weight"], torch.eye(4))


def test_broken_files(tmp_path: Path) -> None:
    half = tmp_path / "half.safetensors"
    half.write_bytes(GOLDEN.read_bytes()[:500_000])
    with pytest.raises(UserError, match="cut short"):
        read_weights(half)
    with pytest.raises(UserError, match="no file"):
        read_weights(tmp_path / "absent.safetensors")
    lone = tmp_path / "lone.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, lone)
    with pytest.raises(UserError, match=r"lora_unet_x has no lora_up\.weight"):
        read_network(lone)
    empty = tmp_path / "empty.safetensors"
    save_file({}, empty)
    with pytest.raises(UserError, match="no network weights"):
        read_weights(empty)


def test_self_check_finds_what_is_wrong(tmp_path: Path) -> None:
    encoder, unet = toy_models()
    network = lora.create_network(1.0, 4, 2.0, None, encoder, unet)
    network.apply_to(encoder, unet)
    path = tmp_path / "net.safetensors"
    network.save_weights(str(path), None, None)
    check = check_network_file(path)
    assert len(check.unmoved) == check.modules == 204
    assert any("no layer moved" in problem for problem in check.problems)
    randomise(network)
    lazy = network.adapters[0]
    torch.nn.init.zeros_(lazy.lora_up.weight)
    network.save_weights(str(path), None, None)
    check = check_network_file(path)
    assert check.unmoved == (lazy.name,)
    blocks = {change.block: change for change in check.blocks}
    expected = sum(a.delta_weight().norm().item() ** 2 for a in network.adapters if "mid_block" in a.name) ** 0.5
    assert blocks["mid_block"].norm == pytest.approx(expected, rel=1e-4)
    assert (blocks["mid_block"].modules, blocks["text encoder"].modules) == (12, 12)
    assert "1 of 204 layers did not move" in "\n".join(check.lines())
    with torch.no_grad():
        network.adapters[5].lora_up.weight[0, 0] = float("nan")
    network.save_weights(str(path), None, None)
    check = check_network_file(path)
    assert check.not_finite == (f"{network.adapters[5].name}.lora_up.weight",)
    assert any("NaN" in problem for problem in check.problems)


def test_self_check_of_another_kind_counts_what_it_cannot_measure(tmp_path: Path) -> None:
    path = tmp_path / "loha.safetensors"
    save_file(
        {"lora_unet_mid_block_x.hada_w1_a": torch.ones(2, 2), "lora_unet_mid_block_x.alpha": torch.ones(())}, path
    )
    check = check_network_file(path)
    assert (check.modules, check.unmeasured, check.problems) == (1, 1, [])
    measured = check_network_file(path, inspect=lambda tensors: {"lora_unet_mid_block_x": 2.0})
    assert [(c.block, c.norm) for c in measured.blocks] == [("mid_block", 2.0)]
