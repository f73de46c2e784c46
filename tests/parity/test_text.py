"""Text conditions equal diffusers' and transformers' own; joining, weights, pooling and the memory of conditions."""

import pytest
import torch
from torch import nn

from library.families.sd import SdFamily
from library.log import UserError
from library.text.encode import ConditionCache, apply_weights, encode_rows, join_rows, pooled_at_first_eos
from library.text.tokens import TextSettings
from tests.text_diffusion_fixtures import diffusers_pipeline, toy_parts

FAMILIES = {"sd1": SdFamily(), "sd2": SdFamily(v2=True)}
PARTS = {name: toy_parts(name) for name in FAMILIES}


def encode(family: str, captions: list[str], settings: TextSettings) -> torch.Tensor:
    tokens = FAMILIES[family].tokenize(captions, settings)
    with torch.no_grad():
        return FAMILIES[family].encode(PARTS[family].text_encoders, tokens, settings).hidden_BTD


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("ours", "theirs"), [(None, None), (1, None), (2, 1), (3, 2)])
def test_condition_equals_the_pipelines(family: str, ours: int | None, theirs: int | None) -> None:
    """diffusers counts skipped layers from 0."""
    pipeline = diffusers_pipeline(PARTS[family])
    captions = ["a photo of a cat", ""]
    expected = pipeline.encode_prompt(captions, "cpu", 1, False, clip_skip=theirs)[0]
    assert (encode(family, captions, TextSettings(clip_skip=ours)) - expected).abs().max() < 1e-5


def test_clip_skip_beyond_the_layers_is_one_line() -> None:
    with pytest.raises(UserError, match="clip_skip 9"):
        encode("sd1", ["a"], TextSettings(clip_skip=9))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("clip_skip", [None, 2])
def test_long_captions_are_rows_encoded_alone_and_joined(family: str, clip_skip: int | None) -> None:
    settings = TextSettings(max_token_length=225, clip_skip=clip_skip)
    caption = "a photo of a cat, " * 30
    joined = encode(family, [caption, ""], settings)
    assert joined.shape[:2] == (2, 227)
    ids_BNT = FAMILIES[family].tokenize([caption, ""], settings).rows[0].ids_BNT
    with torch.no_grad():
        rows = [encode_rows(PARTS[family].text_encoders[0], ids_BNT[:1, n], clip_skip)[0] for n in range(3)]
    expected = torch.cat([rows[0][:1], rows[0][1:76], rows[1][1:76], rows[2][1:76], rows[2][76:]])
    assert (joined[0] - expected).abs().max() < 1e-5


def test_joining_takes_first_inner_and_last_states() -> None:
    hidden = torch.arange(2 * 3 * 5.0).view(6, 5, 1)
    joined = join_rows(hidden, 3)
    assert joined[0, :, 0].tolist() == [0, 1, 2, 3, 6, 7, 8, 11, 12, 13, 14]
    assert torch.equal(join_rows(hidden, 1), hidden)


@pytest.mark.parametrize("length", [None, 225])
def test_weights_of_one_change_nothing(length: int | None) -> None:
    captions = ["a photo of a cat", "a dog"]
    plain = encode("sd1", captions, TextSettings(max_token_length=length))
    weighted = encode("sd1", captions, TextSettings(max_token_length=length, weighted_captions=True))
    assert torch.equal(plain, weighted)
    bracket = encode("sd1", ["a (photo:1.0) of a cat", "(a dog:1)"], TextSettings(length, weighted_captions=True))
    assert torch.equal(plain, bracket)


@pytest.mark.parametrize("length", [None, 150])
def test_weights_keep_the_mean_and_the_layout(length: int | None) -> None:
    plain = encode("sd1", ["a cat"], TextSettings(max_token_length=length))
    weighted = encode("sd1", ["a (cat:1.6)"], TextSettings(max_token_length=length, weighted_captions=True))
    assert weighted.shape == plain.shape
    assert weighted.mean().item() == pytest.approx(plain.mean().item(), rel=1e-3)
    ratio = (weighted[0, 2] / plain[0, 2]).mean() / (weighted[0, 1] / plain[0, 1]).mean()
    assert ratio.item() == pytest.approx(1.6, rel=1e-4)


def test_no_rescaling_by_a_mean_that_is_noise() -> None:
    hidden = torch.randn(1, 77, 64, generator=torch.Generator().manual_seed(0))
    hidden -= hidden.mean()
    weights = torch.ones(1, 77)
    weights[:, 1:4] = 1.3
    assert torch.equal(apply_weights(hidden, weights), hidden * weights.unsqueeze(-1))


def test_weights_of_zero_and_half_precision_stay_finite() -> None:
    hidden = torch.randn(1, 4, 8, dtype=torch.float16)
    found = apply_weights(hidden, torch.zeros(1, 4))
    assert found.dtype == torch.float16
    assert found.eq(0).all()


def test_a_batch_has_no_influence_on_a_captions_weights() -> None:
    settings = TextSettings(max_token_length=150, weighted_captions=True)
    alone = encode("sd1", ["a (cat:1.6)"], settings)
    together = encode("sd1", ["a (cat:1.6)", "(dog:0.2) " * 60], settings)
    assert (alone[0] - together[0]).abs().max() < 1e-6


def test_pooling_is_at_the_first_end_mark_also_with_added_tokens() -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=49410, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=16, eos_token_id=49407,
    )  # fmt: skip
    model = CLIPTextModelWithProjection(config).eval()
    ids = torch.tensor([[49406, 5, 49409, 49407, 49407], [49406, 49407, 0, 0, 0]])
    with torch.no_grad():
        output = model(ids)
        found = pooled_at_first_eos(output.last_hidden_state, ids, 49407, model.text_projection)
        assert (found - output.text_embeds).abs().max() < 1e-6
        at_start = pooled_at_first_eos(output.last_hidden_state, ids.clamp(max=9), 49407, nn.Identity())
        skipped = encode_rows(model, ids, clip_skip=2, final_norm=False)
    assert torch.equal(at_start, output.last_hidden_state[:, 0])
    expected = model(ids, output_hidden_states=True).hidden_states[-2]
    assert (skipped - expected).abs().max() < 1e-6


class Counting:
    """Encodes a caption as its length, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, captions: list[str]) -> tuple[torch.Tensor, None]:
        self.asked += captions
        return torch.tensor([[float(len(caption))] * 25 for caption in captions]), None


def test_cache_encodes_each_caption_once_and_stacks_in_order() -> None:
    encoder = Counting()
    cache = ConditionCache(encoder)
    hidden, pooled = cache(["aa", "b", "aa"])
    assert hidden is not None
    assert hidden[:, 0].tolist() == [2, 1, 2]
    assert pooled is None
    again, _ = cache(["b", "aa"])
    assert again is not None
    assert again[:, 0].tolist() == [1, 2]
    assert encoder.asked == ["aa", "b"]


def test_cache_drops_the_least_recently_used_beyond_its_bytes() -> None:
    encoder = Counting()
    cache = ConditionCache(encoder, max_bytes=200)  # two captions of 100 bytes
    cache(["a", "bb"])
    cache(["a"])
    cache(["ccc"])
    assert len(cache) == 2
    cache(["a", "ccc"])
    assert encoder.asked == ["a", "bb", "ccc"]
    cache(["bb"])
    assert encoder.asked[-1] == "bb"


def test_cached_conditions_do_not_depend_on_the_batch_and_carry_no_graph() -> None:
    family, parts, settings = FAMILIES["sd1"], PARTS["sd1"], TextSettings()

    def encoder(captions: list[str]) -> tuple[torch.Tensor | None, ...]:
        condition = family.encode(parts.text_encoders, family.tokenize(captions, settings), settings)
        return condition.hidden_BTD, condition.pooled_BP

    parts.text_encoders[0].requires_grad_(True)
    try:
        together, _ = ConditionCache(encoder)(["a cat", "a dog", "a bird"])
        alone, _ = ConditionCache(encoder)(["a dog"])
    finally:
        parts.text_encoders[0].requires_grad_(False)
    assert together is not None
    assert alone is not None
    assert torch.equal(together[1:2], alone)
    assert not together.requires_grad
