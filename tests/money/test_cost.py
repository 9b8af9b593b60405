"""What a job did cost: the ledger is the bill, and what is not billed yet is not taken for settled."""

from __future__ import annotations

import random
from datetime import UTC, datetime

import pytest

from scripts.cost import (
    BILL_SECONDS,
    LONGEST_WAIT_SECONDS,
    Quote,
    Settlement,
    ledger,
    pod_bill,
    read_settlement,
    settle,
    spent_this_month,
)
from scripts.job_folder import job_ids, read_job
from scripts.state import job_state
from tests.money.conftest import Place
from tests.money.jobs import HOUR, PRICE, T0, Life


def test_the_ledger_is_the_bill(place: Place) -> None:
    chance = random.Random(7)
    for number in range(6):
        life = place.launch(f"job-{number}")
        place.rest(chance.uniform(30, 2000))
        if number % 2:  # its first machine is lost, a second one goes on
            life.runs(place.clock.now(), since=T0)
            place.vanish()
            place.rest(chance.uniform(30, 700))
            place.launch(f"job-{number}")
            place.rest(chance.uniform(30, 2000))
        life.completed(place.clock.now(), since=T0)
        place.vanish()
        place.tick()
    place.rest(BILL_SECONDS + 1)
    place.tick()
    settlements = [read_settlement(place.store, f"job-{number}") for number in range(6)]
    meter, now = place.local.account.meter, place.clock.now()
    billed = sum(meter.total(pod, now) for pod in meter.spans)
    assert len(meter.spans) == 9
    assert sum(s.usd for s in settlements if s) == pytest.approx(billed, abs=1e-5)
    assert all(s and s.is_final and s.source == "bill" for s in settlements)
    assert [len(s.machines) for s in settlements if s] == [1, 2] * 3


def test_nobody_elses_pods_are_on_the_ledger(place: Place) -> None:
    place.api.create("pods", {"name": "other", "image": "i", "gpu": {"id": "NVIDIA H200", "count": 1}})
    place.launch()
    place.rest(HOUR)
    files = read_job(place.store, "job-1")
    assert pod_bill(place.api, place.store, files).usd == {files.submission.handle["pod"]: pytest.approx(PRICE)}  # type: ignore[union-attr]


def test_a_bill_that_is_late_is_waited_for_and_then_given_up(place: Place) -> None:
    life = place.launch()
    place.rest(HOUR)
    life.completed(T0 + HOUR, since=T0)
    place.vanish()
    place.local.account.meter.spans.clear()  # the provider says nothing yet
    place.tick()
    first = read_settlement(place.store, "job-1")
    assert first is not None
    assert (first.source, first.is_final, round(first.usd, 2)) == ("hours", False, PRICE)
    place.rest(LONGEST_WAIT_SECONDS + 1)
    assert place.tick().done == ["job-1: settled at $2.89 (hours)"]


def test_a_bill_counts_as_closed_two_hours_after_the_end(place: Place) -> None:
    life = place.launch()
    place.rest(1800)
    life.failed(T0 + 1800, since=T0)
    place.vanish()
    for seconds, is_final in ((1.0, False), (BILL_SECONDS - 2, False), (2.0, True)):
        place.rest(seconds)
        place.tick()
        settlement = read_settlement(place.store, "job-1")
        assert settlement is not None
        assert (settlement.source, settlement.is_final) == ("bill", is_final)


def test_what_nobody_bills_is_settled_at_once_by_hours(place: Place) -> None:
    Life(place.store, "job-1").submitted(T0, pod="x").completed(T0 + HOUR, since=T0)
    files = read_job(place.store, "job-1")
    state = job_state(files, None, T0 + 2 * HOUR)
    settlement = settle(place.store, files, state, lambda store, files: None, T0 + 2 * HOUR)
    assert settlement is not None
    assert (settlement.source, settlement.is_final, settlement.usd) == ("hours", True, PRICE)
    assert (settlement.quote_usd, settlement.cap_usd) == (1.5, PRICE)


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def settlement_at(job_id: str, when: float, usd: float, is_final: bool = True) -> Settlement:
    return Settlement(
        job_id=job_id, quote_usd=9.0, cap_usd=9.0, usd=usd, source="bill", submitted_at=when, ended_at=when,
        settled_at=when, is_final=is_final,
    )  # fmt: skip


def test_a_month_counts_what_was_settled_and_what_may_yet_be_spent() -> None:
    first, last = at("2026-11-01T00:00:00"), at("2026-11-30T23:59:59")
    october, december = at("2026-10-31T23:59:59"), at("2026-12-01T00:00:00")
    settlements = [
        settlement_at("a", first, 1.0),
        settlement_at("b", last, 2.0, is_final=False),
        settlement_at("c", october, 100.0),
        settlement_at("d", december, 100.0),
    ]
    quotes = [
        Quote("a", first, 9.0),  # settled: the bill counts
        Quote("b", last, 5.0),  # its bill may still grow: the cap counts
        Quote("e", last, 4.0),  # it runs
        Quote("f", october, 100.0),
    ]
    assert spent_this_month(settlements, quotes, at("2026-11-15T12:00:00")) == 10.0
    assert spent_this_month(settlements, [], at("2026-11-15T12:00:00")) == 3.0
    assert spent_this_month([], [], T0) == 0.0


def test_the_months_total_of_a_store_is_read_from_its_jobs(place: Place) -> None:
    life = place.launch("job-1")
    place.launch("job-2")
    place.rest(HOUR / 2)
    life.completed(T0 + HOUR / 2, since=T0)
    place.api.delete("pods", read_job(place.store, "job-1").submission.handle["pod"])  # type: ignore[union-attr]
    place.rest(BILL_SECONDS + 1)
    place.tick()
    total = spent_this_month(*ledger(place.store, job_ids(place.store)), place.clock.now())
    assert total == pytest.approx(PRICE / 2 + PRICE)  # half an hour billed, and the cap of the other


def test_a_damaged_settlement_is_written_again(place: Place) -> None:
    place.store.write("job-1/settlement.json", b'{"job_id": 3')
    assert read_settlement(place.store, "job-1") is None
