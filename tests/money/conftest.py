"""A local Runpod on a clock that stands still, jobs in its Pods, and the client's own servers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripts.backends.runpod_api import RunpodApi
from scripts.backends.runpod_pod import RunpodPodBackend
from scripts.cost import pod_bill
from scripts.ears import Ears
from scripts.fake_runpod.clock import Clock
from scripts.fake_runpod.server import LocalRunpod, serve
from scripts.launch import launch
from scripts.store import Store, open_store
from scripts.supabase import SupabaseRows
from scripts.tick import Hands, Room, TickReport, tick
from scripts.webhook import Webhook
from tests.money.jobs import T0, Life, spec_of
from tests.money.local_http import Receiver, Supabase, listening

KEY = "local-runpod-key"
SECRET = "a-signing-secret"


@dataclass
class Place:
    """One account, one store, one clock; `rest` moves the clock."""

    store: Store
    local: LocalRunpod
    clock: Clock
    data: Path

    @property
    def environment(self) -> dict[str, str]:
        image = "registry.example/lorry@sha256:" + "0" * 64
        return {"RUNPOD_API_KEY": KEY, "RUNPOD_API_BASE_URL": self.local.url, "LORRY_IMAGE": image}

    @functools.cached_property
    def backend(self) -> RunpodPodBackend:
        return RunpodPodBackend(self.environment, now=self.clock.now, sleep=self.rest)

    @functools.cached_property
    def api(self) -> RunpodApi:
        return RunpodApi(KEY, self.local.url, sleep=self.rest)

    @property
    def hands(self) -> Hands:
        return Hands(lambda name: self.backend, functools.partial(pod_bill, self.api), self.clock.now)

    def rest(self, seconds: float) -> None:
        self.clock.jump(seconds)

    def launch(self, job_id: str = "job-1", **changes: Any) -> Life:
        """A job in a Pod that runs."""
        spec = spec_of(job_id, self.store, **changes)
        launch(self.store, spec, None, self.data, self.backend, self.clock.now())
        return Life(self.store, job_id)

    def tick(self, ears: Ears | None = None) -> TickReport:
        return tick([Room(self.store, ears or Ears())], self.hands)

    def pods(self) -> list[str]:
        """Names of the Pods that there are."""
        return sorted(pod["name"] for pod in self.local.account.held["pods"].values())

    def vanish(self) -> None:
        """Every Pod ends itself, as a machine does when its job is over."""
        for pod_id in list(self.local.account.held["pods"]):
            self.api.delete("pods", pod_id)


@pytest.fixture
def clock() -> Clock:
    return Clock(frozen_at=T0)


@pytest.fixture
def place(tmp_path: Path, clock: Clock) -> Iterator[Place]:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train.jsonl", "valid.jsonl", "report.json"):
        (data / name).write_text("{}\n")
    with serve(KEY, clock=clock) as local:
        yield Place(open_store((tmp_path / "store").as_uri()), local, clock, data)


@pytest.fixture(scope="session")
def http() -> Iterator[httpx.Client]:
    with httpx.Client() as client:
        yield client


@pytest.fixture
def receiver(http: httpx.Client) -> Iterator[tuple[Receiver, Webhook]]:
    taken = Receiver()
    with listening(taken.answer) as url:
        yield taken, Webhook(f"{url}/hook", SECRET, http)


@pytest.fixture
def supabase(http: httpx.Client) -> Iterator[tuple[Supabase, SupabaseRows]]:
    project = Supabase()
    with listening(project.answer) as url:
        yield project, SupabaseRows(url, project.key, project.table, http)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "plain").as_uri())
