"""Routes of every shape: none, all to one expert, duplicates."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.experts.layer import dense_call, make_layer, ours, reference
from trainer.experts.routing import TokenSums, sort_routes

EXPERTS = 5


@st.composite
def routes(draw) -> torch.Tensor:
    tokens, k = draw(st.integers(0, 12)), draw(st.integers(1, 4))
    flat = draw(st.lists(st.integers(0, EXPERTS - 1), min_size=tokens * k, max_size=tokens * k))
    return torch.tensor(flat, dtype=torch.int64).view(tokens, k)


@given(routes(), st.sampled_from([None, 1, 2, EXPERTS]))
@settings(max_examples=150, deadline=None)
def test_blocks_hold_every_route_once_under_its_expert(index, size) -> None:
    found = sort_routes(index, EXPERTS, size)
    seen = []
    for block in found.blocks:
        begin = block.rows.start
        for expert, end in zip(range(EXPERTS)[block.experts], block.ends.tolist(), strict=True):
            rows = found.order[begin : block.rows.start + end]
            assert (index.flatten()[rows] == expert).all()
            assert rows.tolist() == sorted(rows.tolist())
            seen += rows.tolist()
            begin = block.rows.start + end
        assert begin == block.rows.stop
    assert sorted(seen) == list(range(index.numel()))


@given(routes(), st.sampled_from([None, 1, 2]))
@settings(max_examples=100, deadline=None)
def test_rows_sum_back_to_their_tokens(index, size) -> None:
    found = sort_routes(index, EXPERTS, size)
    rows = torch.randn(index.numel(), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sums = TokenSums(found, torch.zeros(len(index), 3, dtype=torch.float64))
    for block in found.blocks:
        sums.add(rows[block.rows].clone(), found.token[block.rows])
    expected = torch.zeros(len(index), 3, dtype=torch.float64).index_add_(0, found.token, rows)
    assert torch.allclose(sums.result(), expected)


@given(routes())
@settings(max_examples=60, deadline=None)
def test_any_routing_gives_the_reference_output(index) -> None:
    layer = make_layer(EXPERTS, hidden=8, width=4, tokens=len(index), k=index.shape[1], rank=2)
    layer = dataclasses.replace(layer, index=index)
    assert torch.allclose(ours(layer, dense_call(layer)), reference(layer), rtol=1e-10, atol=1e-12)


@given(routes(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_order_of_a_tokens_routes_does_not_matter(index, random) -> None:
    layer = make_layer(EXPERTS, hidden=8, width=4, tokens=len(index), k=index.shape[1], rank=2)
    order = random.sample(range(index.shape[1]), index.shape[1])
    layer = dataclasses.replace(layer, index=index)
    turned = dataclasses.replace(layer, index=index[:, order], weight=layer.weight[:, order])
    assert torch.allclose(ours(layer, dense_call(layer)), ours(turned, dense_call(turned)), rtol=1e-10, atol=1e-12)


def test_one_route_with_the_sum_of_two_weights_equals_the_two() -> None:
    layer = make_layer(EXPERTS, tokens=6, k=2)
    twice = dataclasses.replace(layer, index=layer.index[:, :1].expand(-1, 2))
    once = dataclasses.replace(twice, index=twice.index[:, :1], weight=twice.weight.sum(1, keepdim=True))
    assert torch.allclose(ours(twice, dense_call(twice)), ours(once, dense_call(once)), rtol=1e-12)
