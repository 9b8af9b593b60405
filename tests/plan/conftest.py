"""A training-set report of fixed numbers, for plans and renders that can be compared by whole value."""

from __future__ import annotations

import pytest

from recipes.preparation import TokenCounts, TrainingSetReport


def make_report(**changes: object) -> TrainingSetReport:
    tokens = TokenCounts(
        exact=True, tokenizer="fixed", train=168_000, valid=18_900, trained=84_000, longest=980, longest_id="c7"
    )
    report = TrainingSetReport(
        source="conversations.jsonl",
        source_sha256="5" * 64,
        source_bytes=1_000_000,
        form="owner pairs",
        rows=267,
        usable_rows=267,
        skipped=(),
        conversations=267,
        merged=267,
        per_pair=0,
        duplicates=0,
        train_examples=240,
        valid_examples=27,
        train_sha256="7" * 64,
        valid_sha256="a" * 64,
        tokens=tokens,
    )
    return report.model_copy(update=changes)


@pytest.fixture
def report() -> TrainingSetReport:
    return make_report()
