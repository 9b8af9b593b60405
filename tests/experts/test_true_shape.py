"""One layer of the 80B at true shape as a GPU computes it, without memory: strides, shapes, and no number read back.

Fake tensors have shapes but no contents: an operation whose launch waits for a number on the device raises.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from trainer.experts.lora_function import expert_mlp
from trainer.experts.module import ExpertLora, working_factors
from trainer.experts.projection import Call
from trainer.experts.quantised import Int8, Nf4
from trainer.experts.storage import Dense, FrozenStack

EXPERTS, HIDDEN, WIDTH, TOKENS, K = 512, 2048, 512, 8192, 10


def _stack(kind: str, rows: int, width: int, columns: int) -> FrozenStack:
    if kind == "dense":
        return Dense(torch.empty(EXPERTS, rows, width, dtype=torch.bfloat16), columns)
    steps = rows * width // 64 // 256
    scales = {
        "scale_codes": torch.empty(EXPERTS, steps, 256, dtype=torch.int8),
        "scale_steps": torch.empty(EXPERTS, steps),
        "scale_means": torch.empty(EXPERTS),
    }
    if kind == "int8":
        return Int8(torch.empty(EXPERTS, rows, width, dtype=torch.int8), **scales)
    return Nf4(torch.empty(EXPERTS, rows, width // 2, dtype=torch.uint8), **scales)


def _step(
    kind: str, summation: str, layout: str, rank: int, experts_per_block: int | None
) -> tuple[Tensor, ExpertLora]:
    lora = ExpertLora((EXPERTS, HIDDEN, WIDTH), rank, 32, layout=layout, summation=summation)
    x = torch.empty(TOKENS, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(TOKENS, K, dtype=torch.bfloat16, requires_grad=True)
    index = torch.empty(TOKENS, K, dtype=torch.int64)
    columns = 16 if summation == "accumulator" else 0
    stacks = _stack(kind, 2 * WIDTH, HIDDEN, columns), _stack(kind, HIDDEN, WIDTH, columns)
    call = Call(*stacks, lora.scale, summation, keep_gate_up=False, experts_per_block=experts_per_block)
    y = expert_mlp(x, index, weight, working_factors(lora.factors, torch.bfloat16, 8), call)
    y.backward(torch.empty_like(y))
    assert x.grad.shape == (TOKENS, HIDDEN)
    assert weight.grad.shape == (TOKENS, K)
    return y, lora


@pytest.mark.parametrize("kind", ["dense", "int8", "nf4"])
@pytest.mark.parametrize("summation", ["split", "accumulator"])
@pytest.mark.parametrize(("layout", "rank"), [("per_expert", 16), ("shared_outer", 4)])
def test_forward_and_backward_run_without_reading_a_number_back(kind, summation, layout, rank) -> None:
    with FakeTensorMode():
        y, lora = _step(kind, summation, layout, rank, None)
        assert y.shape == (TOKENS, HIDDEN)
        assert all(factor.grad.shape == factor.shape for factor in lora.factors)


def test_blocks_of_some_experts_do_read_their_row_counts() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        _step("dense", "split", "per_expert", 16, 64)


def test_strides_that_cuda_refuses_are_refused_here_too() -> None:
    with FakeTensorMode():
        rows, weights = (torch.empty(*size, dtype=torch.bfloat16) for size in ((64, 20), (4, 20, 16)))
        ends = torch.empty(4, dtype=torch.int32)
        with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
            torch.nn.functional.grouped_mm(rows, weights, offs=ends)
