"""Nothing of the size of the experts' weights is kept or even made."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.experts.layer import SCALE, dense_call, make_layer, ours
from trainer.experts.projection import Call
from trainer.experts.quantised import Int8, Nf4

EXPERTS, HIDDEN, WIDTH, TOKENS, K, RANK = 64, 64, 32, 16, 2, 8
STACK = EXPERTS * 2 * WIDTH * HIDDEN
FACTOR = EXPERTS * RANK * HIDDEN
"The largest factor, an eighth of the larger stack: its gradient must be made."


class _Allocations(TorchDispatchMode):
    """The number of elements of every tensor that gets new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def _layer():
    layer = make_layer(EXPERTS, HIDDEN, WIDTH, TOKENS, K, RANK).to(torch.float32)
    return layer.with_leaves(tuple(leaf.clone().requires_grad_() for leaf in layer.leaves))


def _largest_allocation(layer, call: Call) -> int:
    with _Allocations() as allocations:
        ours(layer, call).backward(torch.ones(TOKENS, HIDDEN))
    return allocations.largest


@pytest.mark.parametrize("summation", ["split", "accumulator"])
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("per_block", [1, None])
def test_no_allocation_is_larger_than_a_factor(summation, keep, per_block) -> None:
    layer = _layer()
    assert _largest_allocation(layer, dense_call(layer, summation, keep, per_block)) <= FACTOR


@pytest.mark.parametrize("kind", [Int8, Nf4])
def test_quantised_experts_are_read_a_block_at_a_time(kind) -> None:
    layer = _layer()
    stacks = (kind.quantise(stack.detach(), EXPERTS) for stack in (layer.gate_up, layer.down))
    call = Call(*stacks, SCALE, "accumulator", False, experts_per_block=4)
    largest_block = 4 * 2 * WIDTH * (HIDDEN + RANK)
    assert _largest_allocation(layer, call) <= max(FACTOR, largest_block) < STACK / 4


def test_the_tracer_sees_what_a_merged_delta_costs() -> None:
    layer = _layer()
    with _Allocations() as allocations:
        layer.gate_up + layer.factors.gate_up_b @ layer.factors.gate_up_a
    assert allocations.largest == STACK


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("per_block", [1, None])
def test_backward_keeps_only_tokens_routes_low_rank_rows_and_factors(keep, per_block) -> None:
    layer, saved = _layer(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(layer, dense_call(layer, "accumulator", keep, per_block))
    rows = TOKENS * K
    expected = [(TOKENS, HIDDEN), (TOKENS, K), (rows,), (rows, RANK), (rows, RANK)]
    expected += [(rows, 2 * WIDTH)] if keep else []
    expected += [tuple(factor.shape) for factor in layer.factors]
    assert [tuple(tensor.shape) for tensor in saved] == expected
