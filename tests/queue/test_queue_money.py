"""Money on the queue: what waits is free, what runs is stopped in time, what was lost is asked for again, once."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.backends.base import Backend
from scripts.backends.runpod_api import RunpodApi
from scripts.backends.runpod_queue import RunpodQueueBackend
from scripts.backends.runpod_queue_claims import QueueClaims, call_off, take
from scripts.cost import pod_bill, read_settlement
from scripts.errors import ProviderError
from scripts.fake_runpod.clock import Clock
from scripts.fake_runpod.server import Fault, LocalRunpod, serve
from scripts.launch import launch
from scripts.reap import World, judge, look, reap
from scripts.rooms import is_within
from scripts.store import Store, open_store
from scripts.tick import Hands, Room, tick
from tests.money.jobs import T0, Life
from tests.queue.conftest import QUEUE, Queue
from tests.queue.test_queue_request import a_spec
from tests.runpod.conftest import KEY, OPENAPI, data_in


class Yard:
    """A queue without workers on a clock that stands still, and one job in a store."""

    def __init__(self, local: LocalRunpod, folder: Path) -> None:
        with RunpodApi(KEY, local.url) as api:
            self.queue = Queue(local, api.create("serverless", QUEUE)["id"])
        self.local, self.clock = local, local.account.clock
        self.store: Store = open_store((folder / "store").as_uri())
        self.data = data_in(folder / "data")
        self.life = Life(self.store, "job-1")

    @property
    def backend(self) -> RunpodQueueBackend:
        environment = {"RUNPOD_API_KEY": KEY, "RUNPOD_API_BASE_URL": self.local.url, "LORRY_STORE": self.store.url}
        environment["RUNPOD_TRAINING_ENDPOINT_ID"] = self.queue.endpoint
        return RunpodQueueBackend(environment, now=self.clock.now, sleep=self.clock.jump)

    def launch(self) -> dict[str, Any]:
        spec = a_spec(store=self.store.url, cap_usd=3.0)
        return launch(self.store, spec, None, self.data, self.backend, self.clock.now()).handle

    def work(self) -> str:
        """A worker takes the first job."""
        with self.local.lock:
            self.local.fleet.advance(self.local.account)
            worker = next(iter(self.local.fleet.workers))
            return self.local.fleet.queue.take(self.queue.endpoint, worker, 1)[0].id

    def reap(self) -> list[str]:
        backends: dict[Any, Backend] = {"runpod_queue": self.backend}
        machines = look(backends, open_store, lambda url: is_within(self.store.url, url))
        decisions = judge(World(tuple(machines)), self.clock.now())
        done = reap(decisions, backends, open_store, self.clock.now())
        assert [one.trouble for one in done if one.trouble] == []
        return [decision.reason for decision in decisions]

    def tick(self) -> list[str]:
        with RunpodApi(KEY, self.local.url) as api:
            hands = Hands(lambda name: self.backend, functools.partial(pod_bill, api), self.clock.now)
            report = tick([Room(self.store)], hands)
        assert report.troubles == []
        return report.done


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Yard]:
    with serve(KEY, OPENAPI, clock=Clock(T0)) as local:
        yield Yard(local, tmp_path)
        assert local.drift == []


def test_a_job_that_waits_costs_nothing_and_its_deadline_does_not_run(yard: Yard) -> None:
    handle = yard.launch()
    yard.clock.jump(3590)
    assert yard.tick() == []
    assert yard.reap() == []
    assert yard.queue.status(handle["queue"])["status"] == "IN_QUEUE"
    yard.clock.jump(20)
    yard.tick()
    assert yard.queue.status(handle["queue"])["status"] == "CANCELLED", "no worker took it in an hour"


@pytest.mark.parametrize("who", ["tick", "reap"])
def test_a_job_past_its_deadline_is_cancelled_by_whoever_looks(yard: Yard, who: str) -> None:
    handle = yard.launch()
    yard.clock.jump(1800)
    yard.work()
    yard.life.runs(yard.clock.now())
    yard.clock.jump(3500)
    yard.life.runs(yard.clock.now(), since=T0 + 1800)
    assert getattr(yard, who)() == []
    yard.clock.jump(180)
    assert any("3600" in said or "deadline" in said for said in getattr(yard, who)())
    assert yard.queue.status(handle["queue"])["status"] == "CANCELLED"
    assert yard.store.read("job-1/stop.json") is not None


def test_queue_jobs_that_are_not_ours_are_never_touched(yard: Yard) -> None:
    foreign = yard.queue.run({"prompt": "of somebody else"})
    ours = yard.launch()["queue"]
    yard.clock.jump(40 * 3600)
    with yard.local.lock:
        for job in yard.local.fleet.queue.jobs.values():
            job.life_seconds = 1e9
    yard.reap()
    yard.tick()
    assert yard.queue.status(foreign)["status"] == "IN_QUEUE"
    assert yard.queue.status(ours)["status"] == "CANCELLED"


def test_an_answer_that_was_lost_is_called_off_and_asked_for_anew(yard: Yard) -> None:
    yard.local.faults.append(Fault("POST", "/run$", 0))
    handle = yard.launch()
    first, second = yard.local.fleet.queue.jobs.values()
    assert (handle["queue"], handle["number"]) == (second.id, 2)
    assert [job.input["number"] for job in (first, second)] == [1, 2]
    late = take(yard.store, "job-1", 1, queue_id=first.id, worker="w1", now=yard.clock.now())
    assert late.queue_id is None, "whoever finds the lost request later does nothing"
    assert yard.launch() == handle


def test_a_lost_answer_whose_job_a_worker_has_begun_is_found_there(yard: Yard) -> None:
    yard.local.faults.append(Fault("POST", "/run$", 500, carried_out=True))
    backend, sent = yard.backend, yard.local.fleet.queue.add

    def taken_at_once(*given: Any, **more: Any) -> Any:
        job = sent(*given, **more)
        take(yard.store, "job-1", 1, queue_id=job.id, worker="w1", now=yard.clock.now())
        return job

    yard.local.fleet.queue.add = taken_at_once  # type: ignore[method-assign]
    spec = a_spec(store=yard.store.url)
    handle = launch(yard.store, spec, None, yard.data, backend, yard.clock.now()).handle
    assert (list(yard.local.fleet.queue.jobs), handle["number"]) == ([handle["queue"]], 1)


def test_a_launcher_killed_between_record_and_answer_leaves_one_training(yard: Yard) -> None:
    claims = QueueClaims(yard.store, "job-1", yard.clock.now)
    mine = claims.take(None)
    assert mine is not None
    claims.write(mine, endpoint=yard.queue.endpoint, asked_at=yard.clock.now())
    lost = yard.queue.run({"job_id": "job-1", "store": yard.store.url, "number": 1})
    handle = yard.launch()  # waits until the dead launcher counts as silent
    assert yard.clock.now() - T0 >= 90
    assert handle["number"] == 2
    assert call_off(yard.store, "job-1", 1, yard.clock.now()).queue_id is None
    assert lost != handle["queue"]


def test_a_job_that_was_lost_is_asked_for_again(yard: Yard) -> None:
    first = yard.launch()
    queue_id = yard.work()
    with yard.local.lock:
        worker = yard.local.fleet.queue.jobs[queue_id].worker or ""
        yard.local.fleet.queue.done(worker, queue_id, b'{"error": "its container is gone"}')
    seen = yard.backend.observe(first)
    assert (seen.phase, "its container is gone" in seen.detail) == ("gone", True)
    again = yard.launch()
    assert (again["number"], again["queue"] != first["queue"]) == (2, True)


def test_a_queue_that_refuses_says_why_and_the_next_launch_asks_anew(yard: Yard) -> None:
    yard.local.faults.append(Fault("POST", "/run$", 401, "invalid key"))
    with pytest.raises(ProviderError, match="invalid key"):
        yard.launch()
    assert yard.launch()["number"] == 2


def test_a_cancel_that_was_not_answered_is_sent_again(yard: Yard) -> None:
    handle = yard.launch()
    yard.local.faults.append(Fault("POST", "/cancel/", 502, times=2))
    yard.backend.stop(handle)
    assert yard.queue.status(handle["queue"])["status"] == "CANCELLED"
    yard.local.faults.append(Fault("POST", "/cancel/", 502, times=3))
    with pytest.raises(ProviderError):
        yard.backend.stop(handle)


def test_a_job_is_settled_by_the_time_it_ran_and_not_by_its_wait(yard: Yard) -> None:
    yard.launch()
    yard.clock.jump(3000)
    queue_id = yard.work()
    yard.clock.jump(1800)
    yard.life.runs(yard.clock.now(), since=T0 + 3000).failed(yard.clock.now(), T0 + 3000)
    with yard.local.lock:
        worker = yard.local.fleet.queue.jobs[queue_id].worker or ""
        yard.local.fleet.queue.done(worker, queue_id, b'{"error": "no"}')
    assert any("settled at $1.37 (hours)" in said for said in yard.tick())
    settlement = read_settlement(yard.store, "job-1")
    assert settlement is not None
    assert (settlement.is_final, settlement.usd) == (True, pytest.approx(2.736 / 2))
