"""`lorry bench plan`: what was planned against what came, for jobs at every stage of a life."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.catalog import load_catalog
from recipes.job import Metric, Result
from recipes.load import load_recipe
from recipes.preparation import OfferPlan
from scripts.bench_plan import compare, medians
from scripts.cli import main
from scripts.cost import Settlement
from scripts.plan import make_plan
from scripts.store import FileStore
from tests.money.jobs import HOUR, OFFER, T0, Life, spec_of


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path)


def _planned(store: FileStore, job_id: str) -> OfferPlan:
    """plan.json and a launch.json that carries its expectations."""
    plan = make_plan(load_recipe("smoke/zero3"), None, load_catalog())
    store.write(f"{job_id}/plan.json", plan.model_dump_json().encode())
    spec = spec_of(job_id, store, expected_step_seconds=2.0, expected_peak_gib=10.0)
    store.write(f"{job_id}/launch.json", spec.model_dump_json().encode())
    return next(offer for offer in plan.offers if offer.offer == OFFER)


def _train(step: int, at: float, attempt: int = 1) -> Metric:
    return Metric(kind="train", at=at, attempt=attempt, epoch=1, step=step, training_loss=2.0)


def _ran(store: FileStore, job_id: str, seconds_per_step: float, peak: float, usd: float) -> OfferPlan:
    """A job of two attempts: loading took 90 s, and one step of ten waited a minute for a checkpoint."""
    Life(store, job_id).submitted(T0).completed(T0 + HOUR, T0 + 60)
    offer = _planned(store, job_id)
    at, metrics = T0 + 150, [Metric(kind="eval", at=T0 + 150, attempt=1, epoch=0, step=0, validation_loss=3.0)]
    for step in range(1, 10):
        at += seconds_per_step + (60 if step == 5 else 0)
        metrics.append(_train(step, at))
    metrics += [_train(9, at + 900, attempt=2), _train(10, at + 900 + seconds_per_step, attempt=2)]
    lines = "".join(metric.model_dump_json() + "\n" for metric in metrics)
    store.write(f"{job_id}/metrics.jsonl", lines.encode() + b'{"kind": "tr')
    result = Result(job_id=job_id, outcome="completed", exit_code=0, attempt=2, step=10, total_steps=10, peak_gib=peak)
    store.write(f"{job_id}/result.json", result.model_dump_json().encode())
    settled = Settlement(
        job_id=job_id, quote_usd=1.5, cap_usd=2.89, usd=usd, source="bill", submitted_at=T0, ended_at=T0 + HOUR,
        settled_at=T0 + 3 * HOUR, is_final=True,
    )  # fmt: skip
    store.write(f"{job_id}/settlement.json", settled.model_dump_json().encode())
    return offer


def test_every_figure_stands_beside_its_plan(store: FileStore) -> None:
    offer = _ran(store, "job-1", 3.0, 12.0, 0.75)
    assert offer.usd is not None
    rows = {row.what: row for row in compare(store, "job-1")}
    assert (rows["seconds per step"].planned, rows["seconds per step"].real) == (2.0, pytest.approx(3.0))
    assert rows["seconds per step"].ratio == pytest.approx(1.5)
    assert (rows["peak GiB"].planned, rows["peak GiB"].real) == (10.0, 12.0)
    start = offer.minutes["load"].likely + offer.minutes["evaluate"].likely / 2
    assert rows["minutes to first figure"].planned == pytest.approx(start)
    assert rows["minutes to first figure"].real == pytest.approx(1.5)
    assert (rows["dollars, likely"].planned, rows["dollars, likely"].real) == (offer.usd.likely, 0.75)
    assert (rows["dollars, quoted"].planned, rows["dollars, quoted"].ratio) == (1.5, 0.5)


def test_a_job_that_never_trained_has_gaps_and_no_ratios(store: FileStore) -> None:
    Life(store, "job-1").submitted(T0)
    rows = compare(store, "job-1")
    assert [row.real for row in rows] == [None] * 5
    assert medians([rows]) == {}


def test_median_is_over_the_jobs_that_know_the_figure(store: FileStore) -> None:
    for job_id, seconds in (("job-1", 1.0), ("job-2", 2.0), ("job-3", 8.0)):
        _ran(store, job_id, seconds, 10.0, 1.5)
    Life(store, "job-4").submitted(T0)
    found = medians([compare(store, f"job-{n}") for n in (1, 2, 3, 4)])
    assert found["seconds per step"] == pytest.approx(1.0)
    assert found["dollars, quoted"] == pytest.approx(1.0)


def test_the_command_prints_a_table_and_json(store: FileStore, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("LORRY_STORE", tmp_path.as_uri())
    _ran(store, "job-1", 3.0, 12.0, 0.75)
    _ran(store, "job-2", 3.0, 12.0, 0.75)
    assert main(["bench", "plan", "job-1", "job-2"]) == 0
    table = capsys.readouterr().out
    assert table.count("  seconds per step                  2.00      3.00       1.50\n") == 2
    assert "median of real/plan" in table
    assert all(len(line) <= 100 for line in table.splitlines())
    assert main(["bench", "plan", "job-1", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["jobs"]["job-1"][1] == {"what": "peak GiB", "planned": 10.0, "real": 12.0, "ratio": 1.2}
    assert said["medians"]["peak GiB"] == 1.2


def test_an_unknown_job_is_not_found(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("LORRY_STORE", tmp_path.as_uri())
    assert main(["bench", "plan", "job-9"]) == 4
    assert "no such job" in capsys.readouterr().err
