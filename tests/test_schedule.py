"""Which examples and which learning rate belong to a step."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.schedule import batch_of_step, epoch_of_step, learning_rate_of_step, steps_in

sizes = st.integers(1, 60)


@given(examples=sizes, epochs=st.integers(1, 4), batch=st.integers(1, 20), seed=st.integers(0, 9))
def test_every_example_is_seen_once_an_epoch(examples: int, epochs: int, batch: int, seed: int) -> None:
    steps = steps_in(examples, epochs, batch)
    seen = Counter(i for step in range(steps) for i in batch_of_step(step, examples, batch, seed))
    assert set(seen) == set(range(examples))
    assert min(seen.values()) >= epochs
    assert sum(seen.values()) - epochs * examples < batch  # only the last step is filled up


@given(examples=sizes, batch=st.integers(1, 20))
def test_epochs_are_shuffled_apart_and_numbered(examples: int, batch: int) -> None:
    assert epoch_of_step(0, examples, batch) == 0
    assert epoch_of_step(examples, examples, 1) == 1


def test_the_same_seed_gives_the_same_batches_and_another_seed_others() -> None:
    first = [batch_of_step(s, 50, 8, seed=1) for s in range(20)]
    assert first == [batch_of_step(s, 50, 8, seed=1) for s in range(20)]
    assert first != [batch_of_step(s, 50, 8, seed=2) for s in range(20)]


def test_max_steps_ends_the_run_early() -> None:
    assert steps_in(10, 3, 4) == 8
    assert steps_in(10, 3, 4, max_steps=5) == 5
    assert steps_in(10, 3, 4, max_steps=50) == 8


def test_the_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    rates = [learning_rate_of_step(s, 100, 1e-3, "cosine", 0.1) for s in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == pytest.approx(1e-3)
    assert max(rates) == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-4, rel=0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_constant_rate_stays() -> None:
    assert {learning_rate_of_step(s, 50, 2e-4, "constant", 0.0) for s in range(50)} == {2e-4}
