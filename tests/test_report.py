"""The page a person looks at when a job has ended."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from recipes.job import LaunchSpec, Metric, Proof, Result, TrainedGroup
from recipes.preparation import Plan, TokenCounts, TrainingSetReport
from recipes.recipe import Base, Recipe
from scripts.loss_chart import loss_chart
from scripts.report import ReportInput, report_html

HASH = "0" * 64


def metrics(count: int) -> list[Metric]:
    steps = [
        Metric(kind="train", at=0.0, attempt=1, epoch=0, step=s, training_loss=6.0 - s / 20, learning_rate=1e-3)
        for s in range(1, count + 1)
    ]
    evals = [Metric(kind="eval", at=0.0, attempt=1, epoch=0, step=s, validation_loss=6.0 - s / 25) for s in (0, count)]
    return steps + evals


def job(**changes: object) -> ReportInput:
    tokens = TokenCounts(
        exact=True, tokenizer="smoke", train=900, valid=100, trained=400, longest=80, longest_id="c<1>"
    )
    report = TrainingSetReport(
        source="<script>alert(1)</script>.jsonl", source_sha256=HASH, source_bytes=1, form="pairs", rows=9,
        usable_rows=8, skipped=(), conversations=4, merged=4,
        per_pair=0, duplicates=0, train_examples=3, valid_examples=1,
        train_sha256=HASH, valid_sha256=HASH, tokens=tokens,
    )  # fmt: skip
    spec = LaunchSpec(
        job_id="smoke-1", recipe_name="smoke/zero3", recipe_sha256=HASH, recipe=Recipe(base=Base(id="lorry/smoke")),
        backend="local", offer="local-2", model_type="qwen3_next", gpus=2, nodes=1, accumulation_steps=1,
        total_steps=20, steps_per_epoch=5, trainable_parameters=99, deadline_seconds=60,
        quote_usd=1.0, cap_usd=2.0, source="x",
        source_sha256=HASH, train_sha256=HASH, valid_sha256=HASH, train_examples=3, valid_examples=1, store="file:///x",
    )  # fmt: skip
    plan = Plan(
        recipe="smoke/zero3", recipe_sha256=HASH, model="lorry/smoke", trainable_parameters=99, examples=3,
        train_tokens=900, longest_tokens=80, tokens_exact=True, steps=20, steps_per_epoch=5, offers=(),
        chosen="local-2",        prices_of="2026-11-22",
    )  # fmt: skip
    result = Result(
        job_id="smoke-1", outcome="completed", exit_code=0, attempt=1, step=20, total_steps=20,
        initial_validation_loss=6.0, final_validation_loss=5.2, first_training_loss=5.9, final_training_loss=5.0,
        trained=(TrainedGroup(group="experts", matrices=8, parameters=99),), trainable_parameters=99, wall_seconds=75.0,
    )  # fmt: skip
    proof = Proof(
        job_id="smoke-1", passed=True, sentence="", adapter_sha256={}, tensors=4, tensors_consumed=4, effect=0.1,
        reproduction_error=0.0, positions=16, seconds=1.0,
    )  # fmt: skip
    values = {
        "launch": spec, "plan": plan, "training_set": report, "result": result, "proof": proof, "manifest": None,
        "metrics": metrics(20), "outcome": "completed", "sentence": "", "cost_usd": 0.0,
    }  # fmt: skip
    return ReportInput(**{**values, **changes})  # type: ignore[arg-type]


class _Checker(HTMLParser):
    """Counts what is open; a self-contained page loads nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        self.loads += [value or "" for name, value in attrs if name in {"src", "href"}]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in {"circle", "line", "polyline"}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing() -> None:
    checker = _Checker()
    page = report_html(job())
    checker.feed(page)
    assert checker.open == []
    assert checker.loads == []
    assert "6.000 to 5.200" in page
    assert "yes, proven" in page


def test_values_from_outside_are_escaped() -> None:
    page = report_html(job())
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_a_failed_job_says_why_and_offers_no_adapter() -> None:
    page = report_html(job(outcome="failed", sentence="a GPU ran out of memory", result=None, proof=None, metrics=[]))
    assert "a GPU ran out of memory" in page
    assert "No step was finished" in page
    assert "How to load" not in page


def test_every_point_of_the_chart_lies_inside_the_picture() -> None:
    chart = loss_chart(metrics(20))
    numbers = [
        tuple(map(float, p.split(","))) for points in re.findall(r'points="([^"]+)"', chart) for p in points.split()
    ]
    assert len(numbers) == 20 + 20 + 2
    assert all(0 <= x <= 760 and 0 <= y <= 300 for x, y in numbers)


@pytest.mark.parametrize("losses", [[5.0], [5.0, 5.0], [1e-6, 2e-6], [0.0, 100.0], [float("nan"), 3.0]])
def test_odd_losses_still_draw(losses: list[float]) -> None:
    rows = [
        Metric(kind="train", at=0.0, attempt=1, epoch=0, step=n + 1, training_loss=loss, learning_rate=1e-3)
        for n, loss in enumerate(losses)
    ]
    assert loss_chart(rows).startswith("<svg")


def test_the_report_needs_no_files(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(report_html(job()), encoding="utf-8")
    assert (tmp_path / "report.html").stat().st_size > 2000
