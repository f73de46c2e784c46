"""Every type of adapter on every kind of layer: identity at start, merge = forward, exact unmerge, dtypes, dropouts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.log import UserError
from networks.adapter import Adapter, AdapterSize, Dropouts
from networks.kinds import adapter_of, adapter_types, kind_of
from networks.lora import LoraAdapter
from tests.networks_fixtures import randomise

LAYERS = {
    "linear": lambda: nn.Linear(12, 20),
    "linear without bias": lambda: nn.Linear(12, 20, bias=False),
    "1x1": lambda: nn.Conv2d(12, 20, 1),
    "3x3": lambda: nn.Conv2d(12, 20, 3, padding=1),
    "3x3 stride 2": lambda: nn.Conv2d(12, 20, 3, stride=2, padding=1),
}
# Other forms of a type: arguments of its constructor.
FORMS: dict[str, dict[str, object]] = {
    "LoraAdapter use_tucker": {"use_tucker": True},
    "DoraLora use_tucker": {"use_tucker": True},
    "DoraLora per input": {"wd_on_output": False},
    "LohaAdapter use_tucker": {"use_tucker": True},
    "DoraLoha per input": {"wd_on_output": False, "use_tucker": True},
    "LokrAdapter": {"factor": 2},
    "LokrAdapter whole": {"full_matrix": True},
    "LokrAdapter both thin": {"factor": 10, "decompose_both": True},
    "LokrAdapter use_tucker": {"factor": 2, "use_tucker": True},
    "DoraLokr": {"factor": 2},
    "DoraLokr per input": {"wd_on_output": False},
}
ALPHA_IS_RANK = {"LokrAdapter whole"}
_PLAIN = {kind.__name__: kind for kind in adapter_types()}
TYPES = _PLAIN | {form: _PLAIN[form.split()[0]] for form in FORMS}
matrix = pytest.mark.parametrize(("kind", "shape"), [(kind, shape) for kind in TYPES for shape in LAYERS])


def make(
    kind: str, shape: str, dtype: torch.dtype = torch.float32, rank: int = 4, **options: object
) -> tuple[nn.Module, Adapter]:
    torch.manual_seed(0)
    layer = LAYERS[shape]().to(dtype).requires_grad_(False)
    options = {**FORMS.get(kind, {}), **options}
    adapter = TYPES[kind]("lora_unet_x", layer, AdapterSize(rank, 2.0), **options)  # type: ignore[arg-type]
    adapter.start()
    adapter.attach()
    return layer, adapter


def inputs(layer: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(2, 12, 6, 6)] if isinstance(layer, nn.Conv2d) else [(2, 12), (2, 5, 12)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def plain(layer: nn.Module, x: Tensor) -> Tensor:
    return type(layer).forward(layer, x)


@matrix
def test_a_new_adapter_changes_nothing(kind: str, shape: str) -> None:
    layer, _ = make(kind, shape)
    for x in inputs(layer):
        assert torch.equal(layer(x), plain(layer, x))


@matrix
def test_merged_equals_attached_and_unmerge_is_exact(kind: str, shape: str) -> None:
    layer, adapter = make(kind, shape, multiplier=0.7)
    randomise(adapter)
    before = layer.weight.clone()
    attached = [layer(x) for x in inputs(layer)]
    adapter.backup()
    adapter.merge()
    assert not torch.equal(layer.weight, before)
    for x, expected in zip(inputs(layer), attached, strict=True):
        torch.testing.assert_close(layer(x), expected, atol=2e-6, rtol=1e-5)
    adapter.unmerge()
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer(inputs(layer)[0]), attached[0])


@matrix
def test_default_combine_agrees_with_the_cheaper_one(kind: str, shape: str) -> None:
    layer, adapter = make(kind, shape, multiplier=-1.5)
    randomise(adapter)
    for x in inputs(layer):
        expected = plain(layer, x) - 1.5 * Adapter.change(adapter, x)
        torch.testing.assert_close(layer(x), expected, atol=5e-6, rtol=1e-5)


@matrix
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layers_take_float32_adapters_without_autocast(
    kind: str, shape: str, dtype: torch.dtype
) -> None:
    layer, adapter = make(kind, shape, dtype)
    randomise(adapter, size=1.0)
    exact_layer, exact = make(kind, shape)
    randomise(exact, size=1.0)
    exact_layer.load_state_dict(layer.state_dict())
    for x in inputs(layer, dtype):
        y = layer(x)
        assert y.dtype is dtype
        torch.testing.assert_close(y.float(), exact_layer(x.float()), atol=0.04, rtol=0.04)
        assert (y - plain(layer, x)).abs().max() > 0.25  # what is compared is far more than the tolerance
        y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in adapter.trained_parameters())
    assert layer.weight.grad is None


@matrix
def test_autocast_over_float32_gives_the_same(kind: str, shape: str) -> None:
    layer, adapter = make(kind, shape)
    randomise(adapter, size=1.0)
    for x in inputs(layer):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        torch.testing.assert_close(y.float(), layer(x), atol=0.08, rtol=0.04)
        assert (y - plain(layer, x)).abs().max() > 0.25  # what is compared is far more than the tolerance


@matrix
def test_state_dict_has_the_named_tensors_and_alpha_decides_the_scale(kind: str, shape: str) -> None:
    layer, adapter = make(kind, shape)
    randomise(adapter)
    state = adapter.state_dict()
    if kind == TYPES[kind].__name__ and not adapter.optional_names:
        assert tuple(state) == adapter.tensor_names
    assert adapter.fits(state)
    other_layer, other = make(kind, shape)
    if kind in ALPHA_IS_RANK or not adapter.alpha_scales:
        stated = {"alpha": torch.tensor(8.0)} if kind in ALPHA_IS_RANK else {}  # of whole blocks no alpha counts
        other.load_state_dict({**state, **stated})
        torch.testing.assert_close(other.delta_weight(), adapter.delta_weight(), atol=0, rtol=0)
        return
    # the reference computed the scale once, so that a loaded alpha was saved but not used
    other.load_state_dict({**state, "alpha": torch.tensor(8.0)})
    assert other.scale == 2.0
    torch.testing.assert_close(other.delta_weight(), adapter.delta_weight() * 4)
    x = inputs(layer)[0]
    change, stronger = layer(x) - plain(layer, x), other_layer(x) - plain(other_layer, x)
    torch.testing.assert_close(stronger, change * 4, atol=1e-5, rtol=1e-5)
    other.load_state_dict({name: tensor for name, tensor in state.items() if name != "alpha"})
    assert other.scale == 1.0  # files without alpha: alpha is the rank


@matrix
def test_norm_and_scaling(kind: str, shape: str) -> None:
    _, adapter = make(kind, shape)
    randomise(adapter)
    before = adapter.delta_weight()
    torch.testing.assert_close(adapter.delta_norm(), before.norm())
    if not adapter.can_scale():
        with pytest.raises(UserError, match="cannot be limited"):
            adapter.scale_delta_(torch.tensor(0.25))
        return
    adapter.scale_delta_(torch.tensor(0.25))
    torch.testing.assert_close(adapter.delta_weight(), before / 4)


@matrix
@pytest.mark.parametrize("rank", [1, 4])
def test_thin_factors_are_the_difference(kind: str, shape: str, rank: int) -> None:
    _, adapter = make(kind, shape, rank=rank)
    randomise(adapter)
    factors = adapter.factors()
    if factors is not None:
        torch.testing.assert_close((factors[0] @ factors[1]).view_as(adapter.layer.weight), adapter.delta_weight())


@matrix
def test_tensors_alone_make_the_adapter_again(kind: str, shape: str) -> None:
    layer, adapter = make(kind, shape)
    randomise(adapter)
    state = {name: tensor.half() for name, tensor in adapter.state_dict().items()}
    found = kind_of(state)
    assert found is not None
    assert issubclass(TYPES[kind], found)
    again = adapter_of("lora_unet_x", state, layer=layer if found.needs_weight else None)
    assert type(again) is found
    delta = again.delta_weight()
    torch.testing.assert_close(delta.view_as(layer.weight), adapter.delta_weight(), atol=2e-3, rtol=2e-3)
    if not found.needs_weight:
        torch.testing.assert_close(again.delta_norm(), delta.norm())


@matrix
def test_detach_restores_the_layer(kind: str, shape: str) -> None:
    layer, first = make(kind, shape)
    second = TYPES[kind]("lora_unet_y", layer, AdapterSize(2, 2.0))
    second.attach()
    randomise(first)
    randomise(second, seed=9)
    x = inputs(layer)[0]
    both = layer(x) - plain(layer, x)
    with pytest.raises(RuntimeError, match="later"):
        first.detach()
    second.detach()
    alone = layer(x) - plain(layer, x)
    below = plain(layer, x) + alone
    added = second.combine(below, x) - below  # some types add what depends on x alone, others change what stands below
    assert added.any()
    torch.testing.assert_close(both - alone, added, atol=2e-6, rtol=1e-4)
    first.detach()
    assert "forward" not in vars(layer)
    assert torch.equal(layer(x), plain(layer, x))


@matrix
def test_layer_is_neither_child_nor_saved(kind: str, shape: str) -> None:
    layer, adapter = make(kind, shape)
    assert all(module is not layer for module in adapter.modules())
    assert {id(p) for p in adapter.parameters()}.isdisjoint({id(p) for p in layer.parameters()})
    assert set(layer.state_dict()) <= {"weight", "bias"}


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind.startswith("Dora")])
@pytest.mark.parametrize("shape", list(LAYERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_magnitudes_change_nothing_after_the_model_was_cast(kind: str, shape: str, dtype: torch.dtype) -> None:
    """The norms of a cast weight differ in the last bits; a new adapter that remembered the old ones would act."""
    layer, adapter = make(kind, shape)
    layer.to(dtype)
    adapter.to(torch.bfloat16)
    assert adapter.get_parameter("dora_scale").dtype is torch.float32
    for x in inputs(layer, dtype):
        assert torch.equal(layer(x), plain(layer, x))
    assert not adapter.delta_weight().any()
    before = layer.weight.clone()
    adapter.merge()
    assert torch.equal(layer.weight, before)


def test_loaded_magnitudes_are_kept_whatever_the_weight_is() -> None:
    _, adapter = make("DoraLora", "linear")
    state = {**adapter.state_dict(), "dora_scale": torch.full((20,), 3.0)}  # PEFT's shape
    adapter.load_state_dict(state)
    weight = adapter.layer.weight + adapter.delta_weight()  # type: ignore[operator]
    torch.testing.assert_close(weight.norm(dim=1), torch.full((20,), 3.0))


def test_magnitudes_divide_the_weight_without_what_others_have_merged() -> None:
    layer, first = make("LoraAdapter", "linear")
    second = TYPES["DoraLora"]("lora_unet_y", layer, AdapterSize(4, 2.0))
    randomise(first)
    randomise(second, seed=9)
    before, expected = layer.weight.clone(), first.delta_weight() + second.delta_weight()
    for adapter in (first, second):
        adapter.backup()
    for adapter in (first, second):
        adapter.add_to_layer()
    torch.testing.assert_close(layer.weight - before, expected)


@pytest.mark.parametrize("shape", list(LAYERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_input_and_rank_activations_are_kept_for_the_backward_pass(shape: str, dtype: torch.dtype) -> None:
    layer, adapter = make("LoraAdapter", shape, dtype)
    x = inputs(layer, dtype)[-1].requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    hidden = y.numel() // 20 * adapter.rank
    weights = {layer.weight.data_ptr()} | {p.data_ptr() for p in adapter.parameters()}
    activations = [t for t in kept if t.data_ptr() not in weights and t.numel() > 4 * 12 * 9]
    assert {t.data_ptr() for t in activations if t.numel() == x.numel()} <= {x.data_ptr()}
    assert {t.numel() for t in activations} <= {x.numel(), hidden}
    assert y.numel() not in {x.numel(), hidden}


def test_module_dropout_leaves_zero_gradients_not_none() -> None:
    """With several processes a missing gradient on one of them is an error."""
    layer, adapter = make("LoraAdapter", "linear", dropouts=Dropouts(module=0.5))
    randomise(adapter)
    adapter.is_skipped = True
    x = inputs(layer)[0]
    y = layer(x)
    assert torch.equal(y, plain(layer, x))
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in adapter.parameters())
    adapter.eval()
    assert not torch.equal(layer(x), plain(layer, x))


@pytest.mark.parametrize("shape", list(LAYERS))
def test_rank_dropout_drops_whole_ranks_per_row_and_keeps_the_mean(shape: str) -> None:
    layer, adapter = make("LoraAdapter", shape, dropouts=Dropouts(rank=0.4))
    randomise(adapter)
    assert isinstance(adapter, LoraAdapter)
    x = inputs(layer)[-1][:1].expand(4000, *[-1] * (inputs(layer)[-1].dim() - 1))
    hidden = adapter._operate(x, adapter.lora_down.weight)  # pyright: ignore[reportPrivateUsage]
    dropped = adapter._dropped(hidden) / (adapter.factor / 0.6)  # pyright: ignore[reportPrivateUsage]
    kept = (dropped / hidden).round()
    rows = kept if kept.dim() == 2 else (kept.flatten(2).movedim(1, -1) if kept.dim() == 4 else kept)
    if rows.dim() == 3:
        assert torch.equal(rows, rows[:, :1].expand_as(rows))  # one mask for all tokens of a row
        rows = rows[:, 0]
    assert rows.float().mean().item() == pytest.approx(0.6, abs=0.02)
    mean = (layer(x) - plain(layer, x)).mean(0)
    adapter.eval()
    expected = (layer(x) - plain(layer, x))[0]
    assert (mean - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize(("rate", "shape"), [("rank", "linear"), ("rank", "3x3"), ("neuron", "linear")])
def test_dropouts_of_types_without_rank_activations_keep_the_mean(rate: str, shape: str) -> None:
    layer, adapter = make("LokrAdapter", shape, dropouts=Dropouts(**{rate: 0.4}))
    randomise(adapter)
    x = inputs(layer)[0][:1].expand(4000 if shape == "linear" else 1000, *[-1] * (inputs(layer)[0].dim() - 1))
    change = layer(x) - plain(layer, x)
    adapter.eval()
    whole = (layer(x) - plain(layer, x))[0]
    assert (change.mean(0) - whole).abs().max() < 0.12 * whole.abs().max()
    dropped = change.flatten(2).abs().amax(-1) == 0 if change.dim() == 4 else change == 0
    assert dropped.float().mean().item() == pytest.approx(0.4, abs=0.03)  # whole channels of the output


def test_neuron_dropout_is_inverted_dropout_on_the_rank_activations() -> None:
    layer, adapter = make("LoraAdapter", "linear", dropouts=Dropouts(neuron=0.5))
    randomise(adapter)
    x = inputs(layer)[1]
    torch.manual_seed(7)
    got = layer(x)
    torch.manual_seed(7)
    down, up = adapter.lora_down.weight, adapter.lora_up.weight  # type: ignore[union-attr]
    expected = plain(layer, x) + F.linear(F.dropout(F.linear(x, down), 0.5), up) * 0.5
    torch.testing.assert_close(got, expected)


def test_down_starts_uniform_within_the_fan_in_bound() -> None:
    torch.manual_seed(0)
    adapter = LoraAdapter("x", nn.Conv2d(64, 64, 3), AdapterSize(64, 1.0))
    adapter.start()
    bound = 1 / (64 * 9) ** 0.5
    values = adapter.lora_down.weight
    assert values.abs().max() <= bound
    assert values.abs().max() > 0.99 * bound
    assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not adapter.lora_up.weight.any()


def test_tensors_that_differ_by_trailing_ones_are_reshaped() -> None:
    """SD2 files have 2-D or 4-D tensors for the same projection."""
    _, adapter = make("LoraAdapter", "linear")
    down, up = torch.randn(4, 12, 1, 1), torch.randn(20, 4, 1, 1)
    adapter.load_state_dict({"alpha": torch.tensor([2.0]), "lora_down.weight": down, "lora_up.weight": up})
    assert torch.equal(adapter.lora_down.weight, down[:, :, 0, 0])  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="size mismatch"):
        adapter.load_state_dict({"lora_down.weight": torch.randn(12, 4), "lora_up.weight": up})


def test_wrong_layers_are_refused() -> None:
    with pytest.raises(TypeError, match="LayerNorm"):
        LoraAdapter("x", nn.LayerNorm(4), AdapterSize(4, 1.0))
    with pytest.raises(ValueError, match="grouped"):
        LoraAdapter("x", nn.Conv2d(4, 4, 3, groups=2), AdapterSize(4, 1.0))
    with pytest.raises(ValueError, match="rank"):
        LoraAdapter("x", nn.Linear(4, 4), AdapterSize(0, 1.0))


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind.startswith(("Lora", "Dora", "Loha", "Lokr"))])
@pytest.mark.parametrize("shape", ["linear", "3x3"])
def test_gradients_are_those_of_the_formula(kind: str, shape: str) -> None:
    """The cheap ways and their hand-written gradients against autograd through the weight difference itself."""
    layer, adapter = make(kind, shape, multiplier=0.7)
    randomise(adapter)
    x = inputs(layer)[-1].requires_grad_()
    wanted = [x, *adapter.trained_parameters()]
    seen = torch.randn(plain(layer, x).shape, generator=torch.Generator().manual_seed(2))
    got = torch.autograd.grad((layer(x) * seen).sum(), wanted)
    changed = adapter._operate(x, adapter.delta_weight())  # pyright: ignore[reportPrivateUsage]
    expected = torch.autograd.grad(((plain(layer, x) + 0.7 * changed) * seen).sum(), wanted)
    for ours, exact in zip(got, expected, strict=True):
        assert exact.any()
        torch.testing.assert_close(ours, exact, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "kind", ["LohaAdapter", "LohaAdapter use_tucker", "LokrAdapter", "LokrAdapter whole", "DoraLora"]
)
@pytest.mark.parametrize("shape", list(LAYERS))
def test_nothing_of_the_weights_size_is_kept_for_the_backward_pass(kind: str, shape: str) -> None:
    layer, adapter = make(kind, shape)
    randomise(adapter)
    x = inputs(layer)[-1]
    x = x.repeat(2 if x.dim() == 4 else 40, *(1,) * (x.dim() - 1)).requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    known = {x.data_ptr(), y.data_ptr(), layer.weight.data_ptr()} | {p.data_ptr() for p in adapter.parameters()}
    others = {t.data_ptr(): t.numel() for t in kept if t.data_ptr() not in known}
    # besides input and output: rank activations, and factors in the shape that they are used in
    assert max(others.values(), default=0) < min(x.numel(), y.numel())
    assert layer.weight.numel() not in others.values()
