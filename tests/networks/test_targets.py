"""Target layers are found by path; a model whose structure is not as promised is an error, never a smaller network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from library.log import UserError
from networks.targets import text_encoder_targets, unet_targets
from tests.networks_fixtures import TextEncoderView, toy_models


@pytest.mark.parametrize("layers", [1, 3])
def test_text_encoder_counts_follow_the_number_of_layers(layers: int) -> None:
    encoder, _ = toy_models(layers=layers)
    targets = text_encoder_targets(encoder)
    assert len(targets) == layers * 6
    assert targets[0].name == "lora_te_text_model_encoder_layers_0_self_attn_k_proj"


def test_names_do_not_depend_on_the_wrapping() -> None:
    encoder, _ = toy_models()
    bare, viewed = text_encoder_targets(encoder), text_encoder_targets(TextEncoderView(encoder))
    assert [t.name for t in bare] == [t.name for t in viewed]
    assert [t.layer for t in bare] == [t.layer for t in viewed]


def test_two_text_encoders_have_numbers() -> None:
    first, _ = toy_models()
    second, _ = toy_models(layers=1)
    targets = text_encoder_targets([first, second])
    assert len(targets) == 18
    assert targets[0].name.startswith("lora_te1_")
    assert targets[-1].name.startswith("lora_te2_")
    assert targets[-1].encoder == 1


@pytest.mark.parametrize("sd2", [False, True])
def test_unet_counts(sd2: bool) -> None:
    _, unet = toy_models(sd2)
    plain, everything = unet_targets(unet, False), unet_targets(unet, True)
    assert len(plain) == 192
    matrices = {name for name, p in unet.named_parameters() if p.dim() > 1 and "block" in name.partition(".")[0]}
    assert {f"{t.path}.weight" for t in everything} == matrices  # every weight of two or more dimensions
    assert {t.path for t in plain} == {t.path for t in everything if ".attentions." in t.path}
    assert all(t.block is not None for t in everything)
    mid = [index for index, t in enumerate(everything) if t.block == 12]
    assert mid[-1] == len(everything) - 1  # the model holds the middle block last


def test_other_class_names_make_no_difference() -> None:
    """A dependency once renamed its attention class, and two thirds of the layers went untrained for months."""
    encoder, unet = toy_models()
    for model in (encoder, unet):
        for module in model.modules():
            if type(module) not in (nn.Linear, nn.Conv2d, nn.ModuleList):
                module.__class__ = type("Renamed" + type(module).__name__, (type(module),), {})
    assert len(text_encoder_targets(encoder)) == 12
    assert len(unet_targets(unet, False)) == 192


def test_a_missing_or_renamed_layer_is_an_error() -> None:
    encoder, unet = toy_models()
    attention = encoder.encoder.layers[1].self_attn
    attention.qkv_proj = attention.q_proj
    del attention.q_proj
    with pytest.raises(UserError, match=r"1 of 12 .* missing, first encoder\.layers\.1\.self_attn\.q_proj"):
        text_encoder_targets(encoder)
    unet.mid_block.attentions[0].proj_in = nn.Identity()
    with pytest.raises(UserError, match=r"mid_block\.attentions\.0\.proj_in"):
        unet_targets(unet, False)


def test_unknown_layers_and_models_are_an_error() -> None:
    _, unet = toy_models()
    unet.mid_block.attentions[0].extra = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"mid_block\.attentions\.0\.extra"):
        unet_targets(unet, False)
    with pytest.raises(UserError, match="another kind of model"):
        unet_targets(nn.Sequential(nn.Linear(2, 2)), False)
    with pytest.raises(UserError, match="another kind of model"):
        text_encoder_targets(nn.Sequential(nn.Linear(2, 2)))


def test_making_a_network_with_convolutions_changes_no_later_one() -> None:
    """The reference's list of targets grew for the whole process."""
    from networks import lora

    encoder, unet = toy_models()
    torch.manual_seed(0)
    assert lora.create_network(1.0, 2, 1.0, None, encoder, unet, conv_dim="2").count("unet") > 192
    assert lora.create_network(1.0, 2, 1.0, None, encoder, unet).count("unet") == 192
