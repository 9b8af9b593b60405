"""Asking for a Pod: exactly one, at the quoted price, and none that waits for ever."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from scripts.backends.runpod_api import RunpodApi
from scripts.backends.runpod_machines import QUEUE_SECONDS, useless
from scripts.backends.runpod_pod import RunpodPodBackend
from scripts.errors import ProviderError, Refused
from scripts.fake_runpod.pods import NO_CAPACITY
from scripts.fake_runpod.server import Fault, LocalRunpod, serve
from scripts.store import open_store
from tests.runpod.conftest import IMAGE, KEY, OPENAPI, REPOSITORY, Room, data_in, spec_of

H200 = {"id": "NVIDIA H200", "count": 1}


class Shift:
    """A clock that sleeping moves at once."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        return time.time() + self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture
def runpod() -> Iterator[LocalRunpod]:
    """A local Runpod without machines: what it is asked for is there at once."""
    with serve(KEY, OPENAPI) as local:
        yield local
        assert local.drift == []


@pytest.fixture
def room(runpod: LocalRunpod, tmp_path: Path) -> Room:
    store = open_store((tmp_path / "store").as_uri())
    environment = {"RUNPOD_API_KEY": KEY, "RUNPOD_API_BASE_URL": runpod.url, "LORRY_IMAGE": IMAGE}
    return Room(runpod, store, data_in(tmp_path / "data"), environment, spec_of("job-1", store.url))


def launcher(room: Room, moment: str) -> subprocess.Popen[str]:
    spec = room.data / "spec.json"
    spec.write_text(room.spec.model_dump_json())
    command = [sys.executable, "-m", "tests.runpod.launcher", room.store.url, str(spec), str(room.data), moment]
    environment = {**os.environ, **room.environment}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("moment", ["recorded", "claimed", "created"])
def test_a_launch_killed_around_the_create_ends_as_one_pod(room: Room, moment: str) -> None:
    assert launcher(room, moment).wait(timeout=200) == -9
    recorded = room.files().submission
    assert recorded is not None
    assert recorded.handle == {}
    shift = Shift()
    handle = room.launch(now=shift.now, sleep=shift.sleep).handle
    assert [pod["id"] for pod in room.pods()] == [handle["pod"]]
    assert room.creates() == 1
    assert room.claims().pods() == [handle["pod"]]


def test_fifty_launches_at_once_ask_for_one_pod(room: Room) -> None:
    with ThreadPoolExecutor(50) as pool:
        handles = list(pool.map(lambda _: room.launch(sleep=lambda s: time.sleep(s / 4)).handle, range(50)))
    assert len({handle["pod"] for handle in handles}) == 1
    assert len(room.pods()) == room.creates() == 1


def test_a_pod_that_was_met_beside_another_is_terminated_and_still_accounted_for(room: Room) -> None:
    first = room.launch().handle["pod"]
    with RunpodApi(KEY, room.runpod.url) as api:
        mine = api.read("pods", first)
        assert mine is not None
        same = {key: mine[key] for key in ("name", "image", "env")}
        twin = api.create("pods", {**same, "gpu": H200})
        other = {**mine["env"], "LORRY_STORE": "s3://somebody-else/jobs"}
        foreign = api.create("pods", {**same, "env": other, "gpu": H200})
    assert room.launch().handle["pod"] == first
    assert {pod["id"] for pod in room.pods()} == {first, foreign["id"]}, "the same name in another store is not ours"
    assert room.claims().pods() == [first, twin["id"]]


def test_a_price_above_the_quote_is_refused_before_anything_is_rented(room: Room) -> None:
    room.runpod.account.catalog.prices |= {"NVIDIA A100 80GB PCIe": 1.99, "NVIDIA A100-SXM4-80GB": 2.05}
    with pytest.raises(Refused) as refused:
        room.launch()
    said = str(refused.value)
    assert "1 x NVIDIA A100 80GB PCIe costs $1.99 an hour now, the quote was $1.79" in said
    assert "plan again" in said
    assert room.creates() == 0
    claim = room.claims().newest()
    assert claim is not None
    assert "$1.99" in claim.given_up


def test_a_pod_that_comes_dearer_than_shown_is_given_back_and_accounted_for(room: Room) -> None:
    room.runpod.account.catalog.surcharge = 1.5
    with pytest.raises(Refused, match=r"the Pod came at \$2\.6\d an hour, the quote was \$1\.79; it was given back"):
        room.launch()
    assert room.pods() == []
    assert set(room.billed()) <= set(room.claims().pods())
    assert len(room.claims().pods()) == 1


def test_a_job_without_capacity_anywhere_says_where_it_was_asked_for_and_can_be_launched_again(room: Room) -> None:
    room.runpod.faults.append(Fault("POST", "/v2/pods$", 400, NO_CAPACITY, times=99))
    with pytest.raises(
        ProviderError, match=r"no instances currently available.*launch it again later; asked at 3 places"
    ):
        room.launch()
    room.runpod.faults.clear()
    assert room.launch().handle["pod"]
    for row in room.runpod.account.catalog.stock.values():
        row.clear()
    room.backend.stop(room.submissions[-1].handle)
    with pytest.raises(ProviderError, match="no stock of 1 x NVIDIA A100 80GB PCIe or better in any datacentre"):
        room.launch()


@pytest.mark.parametrize(("status", "said"), [(402, "add credit"), (401, "RUNPOD_API_KEY"), (422, "correct the value")])
def test_what_no_other_place_would_answer_differently_stops_at_once(room: Room, status: int, said: str) -> None:
    room.runpod.faults.append(Fault("POST", "/v2/pods$", status, times=9))
    with pytest.raises(ProviderError, match=said):
        room.launch()
    assert room.creates() == 1


def test_a_missing_secret_is_refused_before_a_pod_is_asked_for(room: Room) -> None:
    room.environment["LORRY_POD_SECRETS"] = "AWS_ACCESS_KEY_ID=store_id,AWS_SECRET_ACCESS_KEY=store_key"
    with pytest.raises(Refused, match="secret store_id: Runpod has none"):
        room.launch()
    assert room.creates() == 0
    with RunpodApi(KEY, room.runpod.url) as api:
        for name in ("store_id", "store_key"):
            api.create("account/secrets", {"name": name, "value": "hidden"})
    assert room.launch().handle["pod"]


def test_a_pod_that_is_stuck_is_terminated_by_whoever_looks_after_the_queue_deadline(room: Room) -> None:
    room.runpod.account.pod_life = ("PROVISIONING",)
    handle = room.launch().handle
    assert room.backend.observe(handle).phase == "waiting"
    late = RunpodPodBackend(room.environment, now=lambda: time.time() + QUEUE_SECONDS + 60)
    seen = late.observe(handle)
    assert seen.phase == "gone"
    assert "still PROVISIONING after 20 minutes; it was terminated" in seen.detail
    assert room.pods() == []


@pytest.mark.parametrize("status", ["EXITED", "ERROR"])
def test_a_pod_that_ended_is_terminated_since_its_disk_costs(room: Room, status: str) -> None:
    room.runpod.account.pod_life = ("RUNNING", "RUNNING", status)
    handle = room.launch().handle
    seen = room.backend.observe(handle)
    assert (seen.phase, room.pods()) == ("gone", [])
    assert status in seen.detail
    assert room.launch().handle["pod"] != handle["pod"]


def test_what_makes_a_pod_useless() -> None:
    def why(status: str, now: float, started_at: str | None = None) -> str:
        return useless({"status": status, "startedAt": started_at}, 10.0, now) or ""

    assert why("TERMINATED", 5.0) == "it is TERMINATED"
    assert why("EXITED", 5.0, "2026-11-27T00:00:00Z") == "it is EXITED"
    assert why("STARTING", 9.9) == ""
    assert "still STARTING" in why("STARTING", 10.1)
    assert why("STARTING", 1e9, "2026-11-27T00:00:00Z") == "", "its container is started again"
    assert why("RUNNING", 1e9) == ""


def test_only_what_carries_name_job_and_deadline_is_ours(room: Room) -> None:
    room.launch()
    with RunpodApi(KEY, room.runpod.url) as api:
        for name, env in (
            ("lorry-other", {}),
            ("lorry-job-2", {"LORRY_JOB": "job-2"}),
            ("lorry-job-3", {"LORRY_JOB": "job-4", "LORRY_DEADLINE": "1"}),
            ("dev-box", {"LORRY_JOB": "dev-box", "LORRY_DEADLINE": "1"}),
        ):
            api.create("pods", {"name": name, "image": "i", "env": env, "gpu": H200})
    owned = room.backend.owned()
    assert [machine.job_id for machine in owned] == ["job-1"]
    assert owned[0].handle["store"] == room.store.url
    assert owned[0].usd_per_hour == pytest.approx(1.79)
    assert owned[0].handle["deadline"] == pytest.approx(time.time() + 3600, abs=60)


def test_offers_tell_stock_and_price_of_today(room: Room) -> None:
    live = {offer.offer: offer for offer in room.backend.offers()}
    assert live["runpod-h200-4"].usd_per_hour == pytest.approx(4 * 4.59)
    assert live["runpod-h200-4"].available
    assert not live.get("runpod-h100-nvl-1"), "not in this catalogue"
