"""Every gradient against a float64 reference that writes each delta out."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.experts.layer import (
    SCALE,
    as_dequantised,
    dense_call,
    make_layer,
    ours,
    outcome,
    reference,
    worst_error,
)
from trainer.experts.lora_function import expert_mlp
from trainer.experts.projection import Call
from trainer.experts.quantised import Int8, Nf4

BOUNDS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 0.012}
# torch's grouped_mm has no float64, so blocks of several experts run in the other two.
WAYS = [(torch.float64, 1), *((dtype, size) for dtype in (torch.float32, torch.bfloat16) for size in (1, 3, None))]


@pytest.mark.parametrize("shared", [False, True], ids=["per expert", "shared outer"])
@pytest.mark.parametrize("summation", ["split", "accumulator"])
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("dtype", "per_block"), WAYS, ids=lambda value: str(value).removeprefix("torch."))
def test_all_gradients_match_the_reference(shared, summation, keep, dtype, per_block) -> None:
    exact = make_layer(shared=shared)
    layer = exact.to(dtype)
    got = outcome(lambda this: ours(this, dense_call(layer, summation, keep, per_block)), layer)
    assert worst_error(got, outcome(reference, layer.to(torch.float64))) <= BOUNDS[dtype]


@pytest.mark.parametrize("quantise", [Int8.quantise, Nf4.quantise], ids=["int8", "nf4"])
@pytest.mark.parametrize("summation", ["split", "accumulator"])
@pytest.mark.parametrize(("dtype", "per_block"), WAYS, ids=lambda value: str(value).removeprefix("torch."))
def test_gradients_through_quantised_experts_match_the_weights_they_hold(quantise, summation, dtype, per_block) -> None:
    layer = make_layer().to(dtype)
    stacks = quantise(layer.gate_up, 16), quantise(layer.down, 16)
    got = outcome(lambda this: ours(this, Call(*stacks, SCALE, summation, False, per_block)), layer)
    expected = outcome(reference, as_dequantised(layer, stacks).to(torch.float64))
    assert worst_error(got, expected) <= BOUNDS[dtype]


@pytest.mark.parametrize(("quantise", "bound"), [(Int8.quantise, 0.012), (Nf4.quantise, 0.2)], ids=["int8", "nf4"])
def test_quantised_experts_stay_near_the_dense_ones(quantise, bound) -> None:
    layer = make_layer(hidden=128, width=64)
    stacks = quantise(layer.gate_up, 16), quantise(layer.down, 16)
    got = outcome(lambda this: ours(this, Call(*stacks, SCALE, experts_per_block=1)), layer)
    assert 0 < worst_error(got, outcome(reference, layer)) <= bound


def test_frozen_experts_alone_give_gradients_to_tokens_and_routing_weights() -> None:
    layer = make_layer()
    silent = dataclasses.replace(layer, factors=type(layer.factors)(*(torch.zeros_like(f) for f in layer.factors)))
    x, weight = layer.x.clone().requires_grad_(), layer.weight.clone().requires_grad_()
    y = expert_mlp(x, layer.index, weight, None, dense_call(layer))
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y.backward(upstream)
    expected = outcome(reference, silent)
    assert (
        worst_error(
            {"y": y.detach(), "x": x.grad, "weight": weight.grad}, {k: expected[k] for k in ("y", "x", "weight")}
        )
        < 1e-14
    )


def test_autograd_agrees_with_finite_differences() -> None:
    layer = make_layer(experts=3, hidden=4, width=2, tokens=4, k=2, rank=2)
    layer = dataclasses.replace(layer, index=torch.tensor([[0, 2], [2, 2], [0, 2], [2, 0]]))
    for summation in ("split", "accumulator"):
        call = dense_call(layer, summation, keep_gate_up=False)
        leaves = tuple(leaf.clone().requires_grad_() for leaf in layer.leaves)
        assert torch.autograd.gradcheck(lambda *given, call=call: ours(layer.with_leaves(given), call), leaves)


@pytest.mark.parametrize("per_block", [1, None])
def test_an_expert_without_tokens_gets_a_gradient_of_exactly_zero(per_block) -> None:
    layer = make_layer().to(torch.float32)
    got = outcome(lambda this: ours(this, dense_call(layer, per_block=per_block)), layer)
    for name in layer.factors._fields:
        assert not got[name][3].any()
        assert got[name][5].any()


@pytest.mark.parametrize("per_block", [1, None])
def test_no_tokens_at_all_give_no_output_and_zero_gradients(per_block) -> None:
    layer = make_layer().to(torch.float32)
    empty = dataclasses.replace(layer, x=layer.x[:0], index=layer.index[:0], weight=layer.weight[:0])
    got = outcome(lambda this: ours(this, dense_call(layer, per_block=per_block)), empty)
    assert got["y"].shape == (0, 64)
    assert not any(got[name].any() for name in layer.factors._fields)


def test_routing_weights_in_another_precision_keep_it() -> None:
    layer = make_layer().to(torch.bfloat16)
    layer = dataclasses.replace(layer, weight=layer.weight.float())
    for per_block in (1, None):
        got = outcome(lambda this, size=per_block: ours(this, dense_call(layer, per_block=size)), layer)
        assert got["weight"].dtype == torch.float32
        assert worst_error(got, outcome(reference, layer.to(torch.float64))) <= BOUNDS[torch.bfloat16]


def test_an_upstream_gradient_without_memory_of_its_own_is_read_rightly() -> None:
    layer = make_layer()
    given = layer.with_leaves(tuple(leaf.clone().requires_grad_() for leaf in layer.leaves))
    got = torch.autograd.grad(ours(given, dense_call(layer)).sum(), given.leaves)
    expected = torch.autograd.grad(reference(given).sum(), given.leaves)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-13) for a, b in zip(got, expected, strict=True))


def test_a_factor_changed_between_forward_and_backward_is_refused() -> None:
    layer = make_layer()
    given = layer.with_leaves(tuple(leaf.clone().requires_grad_() for leaf in layer.leaves))
    y = ours(given, dense_call(layer, "accumulator"))
    with torch.no_grad():
        given.factors.down_b.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_factors_of_another_precision_are_refused_by_name() -> None:
    layer = make_layer()
    mixed = dataclasses.replace(layer, x=layer.x.float(), weight=layer.weight.float())
    with pytest.raises(ValueError, match=r"gate_up_a: torch\.float64 for tokens in torch\.float32"):
        ours(mixed, dense_call(layer))
