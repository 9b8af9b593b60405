"""Chunked cross-entropy against all logits at once."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.experts.test_allocations import _Allocations
from trainer.cross_entropy import IGNORED, chunked_cross_entropy

TOKENS, HIDDEN, VOCABULARY = 37, 16, 211


def _inputs(dtype: torch.dtype, supervised: float = 0.6):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    head = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    labels[torch.rand(TOKENS, generator=generator) >= supervised] = IGNORED
    return hidden.requires_grad_(), head, labels


def _full(hidden, head, labels):
    loss = cross_entropy(hidden.double() @ head.double().t(), labels, reduction="sum")
    return loss, torch.autograd.grad(loss, hidden)[0]


@pytest.mark.parametrize("rows", [1, 5, 1000])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_loss_and_gradient_are_those_of_full_cross_entropy(dtype, bound, rows) -> None:
    hidden, head, labels = _inputs(dtype)
    loss = chunked_cross_entropy(hidden, head, labels, rows)
    gradient = torch.autograd.grad(loss * 0.5, hidden)[0]
    full, expected = _full(hidden, head, labels)
    assert abs(loss.item() - full.item()) <= bound * full.item()
    assert (gradient - expected * 0.5).norm() <= bound * expected.norm()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype


def test_autograd_agrees_with_finite_differences() -> None:
    hidden, head, labels = _inputs(torch.float64)
    few, head, labels = hidden.detach()[:5, :3].clone().requires_grad_(), head[:7, :3], labels[:5] % 7
    labels[1] = IGNORED
    assert torch.autograd.gradcheck(lambda x: chunked_cross_entropy(x, head, labels, 2), few)


def test_masked_rows_get_no_gradient_and_may_hold_anything() -> None:
    hidden, head, labels = _inputs(torch.float32)
    masked = labels == IGNORED
    with torch.no_grad():
        hidden[masked] = float("nan")
    loss = chunked_cross_entropy(hidden, head, labels, 8)
    gradient = torch.autograd.grad(loss, hidden)[0]
    assert torch.isfinite(loss)
    assert not gradient[masked].any()
    assert gradient[~masked].abs().sum() > 0


def test_a_batch_without_supervised_tokens_has_loss_and_gradient_zero() -> None:
    hidden, head, labels = _inputs(torch.float32, supervised=0.0)
    loss = chunked_cross_entropy(hidden, head, labels)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, hidden)[0].any()


def test_huge_logits_neither_overflow_nor_vanish() -> None:
    head = torch.tensor([[1000.0], [-1000.0]])
    hidden = torch.tensor([[1.0], [1.0]], requires_grad=True)
    loss = chunked_cross_entropy(hidden, head, torch.tensor([0, 1]))
    assert loss.item() == 2000
    assert torch.autograd.grad(loss, hidden)[0].flatten().tolist() == [0, 2000]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_allocation_is_larger_than_one_chunk_of_logits(dtype) -> None:
    hidden, head, labels = _inputs(dtype)
    with _Allocations() as allocations:
        chunked_cross_entropy(hidden, head, labels, 4).backward()
    assert allocations.largest == 4 * VOCABULARY
    with _Allocations() as allocations:
        cross_entropy((hidden @ head.t()).float(), labels).backward()
    assert allocations.largest == TOKENS * VOCABULARY


def test_only_the_gradient_of_supervised_rows_is_kept() -> None:
    hidden, head, labels = _inputs(torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        chunked_cross_entropy(hidden, head, labels, 4)
    count = int((labels != IGNORED).sum())
    assert [tuple(t.shape) for t in saved] == [(count,), (count, HIDDEN)]


def test_evaluation_without_gradients_gives_the_same_loss() -> None:
    hidden, head, labels = _inputs(torch.float32)
    with torch.no_grad():
        alone = chunked_cross_entropy(hidden, head, labels, 4)
    assert alone.item() == chunked_cross_entropy(hidden, head, labels, 4).item()


def test_bad_input_is_refused_in_words() -> None:
    hidden, head, labels = _inputs(torch.float32)
    with pytest.raises(ValueError, match="the head's weight wants a gradient; freeze it"):
        chunked_cross_entropy(hidden, head.clone().requires_grad_(), labels)
    with pytest.raises(ValueError, match=r"hidden states \(1, 37, 16\) with 37 labels .* flatten them to \(37, 16\)"):
        chunked_cross_entropy(hidden[None], head, labels)
