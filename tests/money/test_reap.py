"""The reaper on a local Runpod: what is ours and overdue goes, what is not stays, what is forgotten is told."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from scripts.backends.base import Owned
from scripts.backends.runpod_pod import RunpodPodBackend
from scripts.fake_runpod.account import Account
from scripts.fake_runpod.pods import show_pod
from scripts.fake_runpod.server import Fault
from scripts.forgotten import forgotten
from scripts.job_folder import read_job
from scripts.reap import Machine, World, judge, look, reap
from scripts.rooms import is_within
from scripts.store import Store, open_store
from tests.money.conftest import Place
from tests.money.jobs import HOUR, PRICE, T0, Life, spec_of


def stamp_of(seconds: float) -> str:
    """A time as Runpod writes it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


WORLDS, PARTS = 500, 4
NOW = T0 + 100 * HOUR


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    """A folder for thousands of small files, in memory where there is such a place."""
    place = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=place if place.is_dir() else None) as folder:
        yield Path(folder)


@dataclass
class Made:
    """One random account: its root store, and which Pods must be gone after the reaper, which must be left."""

    place: Place
    root: str
    rng: random.Random
    gone: set[str] = field(default_factory=set)
    kept: set[str] = field(default_factory=set)
    jobs: int = 0

    def job(self) -> tuple[Store, Life]:
        """A job folder in the store of the terminal or in that of a client."""
        self.jobs += 1
        url = self.rng.choice([self.root, f"{self.root}/clients/acme/jobs", f"{self.root}/clients/b-2/jobs"])
        store = open_store(url)
        return store, Life(store, f"job-{self.jobs}")

    def pod(self, goes: bool, **changes: Any) -> str:
        pod: dict[str, Any] = {
            "name": "other", "env": {}, "life": ["RUNNING"], "hourly": PRICE, "mounts": {}, "template": None,
            "createdAt": stamp_of(NOW - 600), "startedAt": stamp_of(NOW - 600), "locked": False,
        }  # fmt: skip
        made: str = self.place.local.account.store("pods", pod | changes)["id"]
        (self.gone if goes else self.kept).add(made)
        return made


def marked(store: Store, job_id: str, deadline: object = int(NOW + HOUR), **changes: Any) -> dict[str, Any]:
    """A Pod's name and environment as a launch makes them."""
    env = {"LORRY_JOB": job_id, "LORRY_STORE": store.url, "LORRY_DEADLINE": str(deadline), "LORRY_FRONT_DOOR": ""}
    return {"name": f"lorry-{job_id}", "env": env} | changes


def healthy(world: Made) -> None:
    store, life = world.job()
    pod = world.pod(False, **marked(store, life.job_id, int(NOW + world.rng.randrange(1, 7200))))
    life.submitted(NOW - 600, **world.rng.choice([{"pod": pod}, {}]))
    if world.rng.random() < 0.5:
        life.runs(NOW - world.rng.randrange(1, 100), since=NOW - 500)


def past_its_deadline(world: Made) -> None:
    store, life = world.job()
    life.submitted(NOW - 600)
    world.pod(True, **marked(store, life.job_id, int(NOW - world.rng.randrange(1, 99999))))


def over_its_cap(world: Made) -> None:
    store, life = world.job()
    hours = world.rng.uniform(0.5, 1.5)  # the cap is one hour's price
    pod = world.pod(hours > 1.02, createdAt=stamp_of(NOW - hours * HOUR), **marked(store, life.job_id))
    life.submitted(NOW - hours * HOUR, pod=pod)
    life.runs(NOW - 60, since=NOW - hours * HOUR)


def mute(world: Made) -> None:
    """Its container never says a word; an earlier machine of the job may have."""
    store, life = world.job()
    minutes = world.rng.choice([5, 20, 29, 31, 45])
    world.pod(minutes > 30, createdAt=stamp_of(NOW - 60 * minutes), **marked(store, life.job_id))
    life.submitted(NOW - 3500)
    if world.rng.random() < 0.5:
        life.runs(NOW - 3000, since=NOW - 3400)


def ended_or_stopped(world: Made) -> None:
    store, life = world.job()
    ago = world.rng.choice([60, 110, 130, 280, 320, 3000])
    how = world.rng.choice(["completed", "failed", "stopped"])
    life.submitted(NOW - 3500)
    {"completed": life.completed, "failed": life.failed}.get(how, lambda at, since: life.stopped(at, "cap"))(
        NOW - ago, NOW - 3500
    )
    world.pod(ago > (120 if how == "stopped" else 300), **marked(store, life.job_id))


def left_by_an_earlier_launch(world: Made) -> None:
    store, life = world.job()
    current = world.pod(False, **marked(store, life.job_id))
    life.submitted(NOW - 600, pod=current)
    world.pod(True, **marked(store, life.job_id, int(NOW - 5)))


def exited(world: Made) -> None:
    store, life = world.job()
    life.submitted(NOW - 600)
    world.pod(False, **marked(store, life.job_id, int(NOW - 5), life=[world.rng.choice(["EXITED", "ERROR"])]))


def foreign(world: Made) -> None:
    world.pod(False, name=world.rng.choice(["training", "lorry", "lorrykeeper", "my-lorry-job-1", ""]))


def named_alike(world: Made) -> None:
    """Our name, overdue by every measure, and each time one proof too few."""
    store, life = world.job()
    overdue = int(NOW - 99999)
    fault = world.rng.choice(
        ["no tag", "odd tag", "no job", "other name", "other store", "other backend", "no env", "not asked", "up"]
    )
    pod = marked(store, life.job_id, overdue)
    if fault != "no job":
        life.submitted(NOW - 9999)
    if fault == "no tag":
        del pod["env"]["LORRY_DEADLINE"]
    elif fault == "odd tag":
        pod["env"]["LORRY_DEADLINE"] = world.rng.choice(["", "soon", "-5", "1e9", "{{ RUNPOD_SECRET_x }}"])
    elif fault == "other name":
        pod["name"] = world.rng.choice([f"lorry-{life.job_id}0", life.job_id, f"lorry-dev-{life.job_id}"])
    elif fault == "other store":
        elsewhere = ["file:///elsewhere", f"{world.root}2", f"{world.root}/clients/ACME/jobs", "s3://theirs/jobs", ""]
        pod["env"]["LORRY_STORE"] = world.rng.choice(elsewhere)
    elif fault == "other backend":
        spec = spec_of(life.job_id, store, backend="local")
        store.write(f"{life.job_id}/launch.json", spec.model_dump_json().encode())
        local = b'{"job_id": "j", "backend": "local", "request_sha256": "", "submitted_at": 1, "handle": {}}'
        store.write(f"{life.job_id}/submission.json", local)
    elif fault == "no env":
        pod["env"] = None
    elif fault == "not asked":
        store.write(f"{life.job_id}/submission.json", b"{}")
    elif fault == "up":
        pod["env"]["LORRY_JOB"] = "../" + life.job_id
        pod["name"] = "lorry-../" + life.job_id
    world.pod(False, **pod)


KINDS: list[Callable[[Made], None]] = [
    healthy, past_its_deadline, over_its_cap, mute, ended_or_stopped, left_by_an_earlier_launch, exited, foreign,
    named_alike,
]  # fmt: skip


@dataclass
class WithoutHttp:
    """The local Runpod's own rules, without a request between: 500 worlds over HTTP take a minute."""

    account: Account

    def listed(self, collection: str) -> list[dict[str, Any]]:
        return [show_pod(self.account, pod) for pod in list(self.account.held[collection].values())]

    def delete(self, collection: str, object_id: str) -> None:
        if object_id in self.account.held[collection]:
            self.account.delete(collection, object_id)


@pytest.mark.parametrize("part", range(PARTS))
def test_in_random_worlds_what_is_ours_and_overdue_goes_and_nothing_else_is_touched(
    place: Place, memory: Path, part: int
) -> None:
    place.clock.jump(NOW - T0)
    backend = RunpodPodBackend(place.environment, now=place.clock.now, sleep=place.rest)
    near = RunpodPodBackend(place.environment, now=place.clock.now, sleep=place.rest)
    vars(near)["_api"] = WithoutHttp(place.local.account)
    ended = 0
    for seed in range(part, WORLDS, PARTS):
        backends = {"runpod_pod": backend if seed % 10 == 0 else near}
        place.local.account.held["pods"].clear()
        rng = random.Random(seed)
        world = Made(place, (memory / str(seed)).as_uri(), rng)
        for kind in rng.choices(KINDS, k=rng.randrange(0, 7)):
            kind(world)
        machines = look(backends, open_store, lambda url: is_within(world.root, url))  # noqa: B023
        decisions = judge(World(tuple(machines)), NOW)
        assert set(place.local.account.held["pods"]) == world.gone | world.kept, "to judge touches nothing"
        reaped = reap(decisions, backends, open_store, NOW)
        assert [one.trouble for one in reaped if one.trouble] == []
        assert set(place.local.account.held["pods"]) == world.kept, f"world {seed}"
        ended += len(world.gone)
    assert ended > 100


def test_a_pod_that_cannot_be_ended_keeps_no_other_alive_and_is_told(place: Place) -> None:
    for number in range(3):
        place.launch(f"job-{number}")
    place.rest(2 * HOUR)
    place.local.faults.append(Fault("DELETE", "/pods/", 500, times=10))  # one stop and its repetition
    backends = {"runpod_pod": place.backend}
    machines = look(backends, open_store, lambda url: True)
    reaped = reap(judge(World(tuple(machines)), place.clock.now()), backends, open_store, place.clock.now())
    assert [bool(one.trouble) for one in reaped] == [True, False, False]
    assert place.pods() == ["lorry-job-0"]
    assert "may have been" not in reaped[0].trouble


def test_a_machine_under_another_name_is_told_and_left_alone(store: Store) -> None:
    Life(store, "job-1").submitted(T0)
    handle = {"pod": "p", "name": "lorry-job-2", "store": store.url, "deadline": int(T0)}
    machine = Machine("runpod_pod", Owned("job-1", handle, "running", T0, PRICE), read_job(store, "job-1"))
    decisions = judge(World((machine,)), NOW)
    assert [(d.action, d.machine) for d in decisions] == [("report", None)]
    assert "its name is not that of its job" in decisions[0].reason
    renamed = replace(machine, owned=replace(machine.owned, handle={**handle, "name": "lorry-job-1"}))
    assert [d.action for d in judge(World((renamed,)), NOW)] == ["stop"]


def test_a_reaped_job_says_who_ended_it(place: Place) -> None:
    life = place.launch().runs(T0 + 60, since=T0)
    place.rest(2 * HOUR)
    backends = {"runpod_pod": place.backend}
    reap(judge(World(tuple(look(backends, open_store, lambda url: True))), place.clock.now()), backends, open_store, T0)
    stop = life.record("stop.json")
    assert stop is not None
    assert (stop["by"], stop["reason"]) == ("reaper", "its deadline passed 60 minutes ago")
    assert place.pods() == []


def test_a_pod_of_a_job_that_has_a_newer_one_goes_alone(place: Place) -> None:
    life = place.launch()
    old = next(iter(place.local.account.held["pods"].values()))
    new = place.local.account.store("pods", {**old, "env": {**old["env"], "LORRY_DEADLINE": str(int(T0 + 9 * HOUR))}})
    submission = life.record("submission.json")
    assert submission is not None
    life.submitted(T0, pod=new["id"])
    place.rest(1.01 * HOUR)
    life.runs(place.clock.now(), since=T0)
    backends = {"runpod_pod": place.backend}
    reap(judge(World(tuple(look(backends, open_store, lambda url: True))), place.clock.now()), backends, open_store, T0)
    assert list(place.local.account.held["pods"]) == [new["id"]]
    assert life.record("stop.json") is None


def test_what_is_forgotten_is_priced_by_the_month_and_never_deleted(place: Place) -> None:
    api = place.api
    volume = api.create("network-volumes", {"name": "lorry-dev-models", "size": 500, "dataCenter": "US-KS-2"})
    used = api.create("network-volumes", {"name": "lorry-used", "size": 10, "dataCenter": "US-KS-2"})
    api.create("network-volumes", {"name": "theirs", "size": 4000, "dataCenter": "US-KS-2"})
    scaling = {"type": "QUEUE_DELAY", "queueDelay": 4}
    for name, least, volumes in (("lorry-dev-training", 1, [used["id"]]), ("lorry-idle", 0, []), ("theirs", 3, [])):
        gpu = {"pools": ["HOPPER_141"], "count": 2}
        workers = {"min": least, "max": 3}
        body = {"name": name, "type": "QUEUE", "scaling": scaling, "gpu": gpu, "workers": workers, "image": "i"}
        api.create("serverless", body | {"networkVolumes": volumes, "timeout": 1000})
    place.launch()
    listed = api.listed("pods"), api.listed("network-volumes"), api.listed("serverless")
    pod = listed[0][0]["id"]
    found = {f.name.split(" (")[0]: (f.reason, round(f.usd_per_month, 2)) for f in forgotten(*listed, owned={pod})}
    assert found == {
        "volume lorry-dev-models": ("500 GB that nothing uses now", 35.0),  # 500 x $0.07
        "endpoint lorry-dev-training": ("workers.min is 1: that many workers never sleep", 8146.8),  # 2 x $5.58 x 730
    }
    assert volume["id"] in place.local.account.held["network-volumes"]


def test_exited_and_unmarked_pods_are_told_with_what_they_cost() -> None:
    pods = [
        {"id": "a", "name": "lorry-a", "status": "EXITED", "cost": 0, "mounts": {"persistent": {"size": 100}}},
        {"id": "b", "name": "lorry-b", "status": "RUNNING", "cost": 2.0, "mounts": {}},
        {"id": "c", "name": "lorry-c", "status": "RUNNING", "cost": 2.0, "mounts": {}},
        {"id": "d", "name": "lorry-d", "status": "TERMINATED", "cost": 0, "mounts": {}},
        {"id": "e", "name": "someone", "status": "EXITED", "cost": 0, "mounts": {"persistent": {"size": 100}}},
    ]
    found = forgotten(pods, [], [], owned={"c"})
    assert [(f.name, f.usd_per_month) for f in found] == [("Pod lorry-a (a)", 20.0), ("Pod lorry-b (b)", 1460.0)]
    assert "carries no job" in found[1].reason
