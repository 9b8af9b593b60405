"""Small deltas survive bf16 when summed in the accumulator, whose columns cannot be stale."""

from __future__ import annotations

import ctypes

import pytest
import torch

from benchmarks.experts import delta_share
from tests.experts.layer import dense_call, make_layer, ours, outcome, reference, worst_error
from trainer.experts.storage import Dense


def test_the_accumulator_lets_a_delta_of_a_thousandth_through_whole() -> None:
    assert 0.98 <= delta_share("accumulator") <= 1.02


def test_split_summation_loses_about_half_of_such_a_delta_as_folding_does() -> None:
    assert delta_share("split") < 0.7
    assert delta_share(None) < 0.7


def _in_place(b: torch.Tensor) -> None:
    with torch.no_grad():
        b.mul_(3)


def _through_data(b: torch.Tensor) -> None:
    b.data.mul_(3)


def _new_memory(b: torch.Tensor) -> None:
    b.data = b.data * 3


def _raw_memory(b: torch.Tensor) -> None:
    """As an optimizer with kernels of its own does: torch sees nothing of it."""
    tripled = (b.detach() * 3).contiguous()
    ctypes.memmove(b.data_ptr(), tripled.data_ptr(), tripled.nbytes)


@pytest.mark.parametrize("change", [_in_place, _through_data, _new_memory, _raw_memory])
@pytest.mark.parametrize("per_block", [1, None])
def test_a_changed_factor_is_seen_however_it_was_changed(change, per_block) -> None:
    layer = make_layer().to(torch.float32)
    call = dense_call(layer, "accumulator", per_block=per_block)
    ours(layer, call)
    change(layer.factors.gate_up_b)
    change(layer.factors.down_b)
    assert worst_error({"y": ours(layer, call)}, {"y": reference(layer.to(torch.float64))}) < 1e-6


def test_two_forward_passes_before_their_backward_passes_do_not_disturb_each_other() -> None:
    first = make_layer()
    second = first.with_leaves((first.x, first.weight, *(f * 3 for f in first.factors)))
    call = dense_call(first, "accumulator", keep_gate_up=False)
    given = [
        layer.with_leaves(tuple(leaf.clone().requires_grad_() for leaf in layer.leaves)) for layer in (first, second)
    ]
    upstream = torch.randn(50, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    outputs = [ours(layer, call) for layer in given]
    for layer, y, original in zip(given, outputs, (first, second), strict=True):
        gradients = torch.autograd.grad(y, layer.leaves, upstream)
        expected = outcome(reference, original)
        assert (
            worst_error(
                dict(zip(list(expected)[1:], gradients, strict=True)), {k: expected[k] for k in list(expected)[1:]}
            )
            < 1e-14
        )


def test_storage_without_free_columns_is_refused() -> None:
    layer = make_layer()
    stack = Dense(layer.gate_up, columns=4)
    with pytest.raises(ValueError, match=r"Dense: 4 free columns .* rank 8 .* columns=8"):
        stack.widened(0, 1, torch.float64, layer.factors.gate_up_b[:1], 1.0)
