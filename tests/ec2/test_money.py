"""Money on EC2: a machine taken back is replaced, each is settled by its lifetime, the reaper ends ours alone."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from recipes.job import ContainerState
from scripts import cli
from scripts.audit import chain_store, verify
from scripts.backends.ec2 import Ec2Backend
from scripts.backends.runpod_pod import RunpodPodBackend
from scripts.cost import read_settlement
from scripts.errors import ProviderError
from scripts.fake_runpod.clock import Clock
from scripts.launch import launch
from scripts.reap import World, judge, look, reap
from scripts.store import open_store
from scripts.tick import Hands, Room, tick
from scripts.watch import watch
from tests.ec2.conftest import ec2_spec
from tests.ec2.local_ec2 import Account, Fault
from tests.ec2.test_submit import DOOR
from tests.runpod.conftest import data_in

MINUTE = 60.0


class Place:
    """One job on EC2 and everybody who looks after it."""

    def __init__(self, account: Account, clock: Clock, url: str, folder: Path, backend: Ec2Backend) -> None:
        self.account, self.clock, self.backend, self.folder = account, clock, backend, folder
        self.store = open_store(f"{url}/clients/acme/jobs")
        self.spec = ec2_spec(self.store.url)
        self.hands = Hands(lambda name: backend, backend.charges, clock.now)

    def launch(self) -> str:
        done = launch(self.store, self.spec, None, data_in(self.folder / "data"), self.backend, self.clock.now())
        return str(done.handle["instances"][0])

    def tick(self) -> list[str]:
        report = tick([Room(self.store)], self.hands)
        assert report.troubles == []
        return report.done

    def says(self, **changes: object) -> None:
        """The container's word."""
        now = self.clock.now()
        state = ContainerState(job_id="job-1", stage="training", updated_at=now, started_at=now, pid=1)
        self.store.write("job-1/container.json", state.model_copy(update=changes).model_dump_json().encode())

    def heeds_a_notice(self, instance: str) -> None:
        """Ten minutes later spot wants the machine back; the container saves, says so, and the machine ends itself."""
        self.clock.jump(10 * MINUTE)
        self.says(taken_at=self.clock.now())
        self.clock.jump(40)
        self.account.end(instance, "Client.InstanceInitiatedShutdown")
        self.clock.jump(MINUTE)

    def decided(self) -> list[tuple[str, str]]:
        machines = look({"ec2": self.backend}, open_store, lambda store: store == self.store.url)
        decisions = judge(World(tuple(machines), tuple(self.backend.forgotten())), self.clock.now())
        reap(decisions, {"ec2": self.backend}, open_store, self.clock.now())
        return [(decision.action, decision.name) for decision in decisions]


@pytest.fixture
def place(account: Account, clock: Clock, store: str, tmp_path: Path, backend_of: Callable[..., Ec2Backend]) -> Place:
    account.spot_usd = {("p5.4xlarge", "us-east-1a"): 3.0, ("p5.4xlarge", "us-east-1b"): 3.0}
    backend = backend_of(**DOOR, LORRY_EC2_MARKET="spot")
    backend._bucket = lambda spec: "bucket"  # type: ignore[method-assign]
    return Place(account, clock, store, tmp_path, backend)


def test_a_machine_taken_back_is_replaced_and_both_are_settled_by_their_lifetime(place: Place) -> None:
    first = place.launch()
    place.clock.jump(MINUTE)
    place.says()
    place.clock.jump(29 * MINUTE)
    place.account.end(first, "Server.SpotInstanceTermination")
    place.clock.jump(MINUTE)
    assert place.tick() == ["job-1: launched again: its machine was taken back"]
    (second,) = place.account.alive()
    place.clock.jump(10 * MINUTE)
    place.says(stage="done", ended="failed", cause="out_of_memory", sentence="a GPU ran out of memory")
    place.account.end(second)
    place.clock.jump(MINUTE)
    assert place.tick() == ["job-1: settled at $2.00 (lifetime)"]
    settlement = read_settlement(place.store, "job-1")
    assert settlement is not None
    assert settlement.machines == {first: pytest.approx(1.5), second: pytest.approx(0.5)}
    assert settlement.usd == pytest.approx(place.account.total(), abs=1e-4)


def test_who_watches_asks_for_another_machine_too_and_hears_what_machines_print(place: Place) -> None:
    first, out = place.launch(), io.StringIO()
    place.clock.jump(MINUTE)
    place.says()
    place.account.end(first, "Server.SpotInstanceTermination")
    place.account.faults.append(Fault("run_instances", "InsufficientInstanceCapacity", times=2))  # both zones, once

    def sleep(seconds: float) -> None:
        place.clock.jump(seconds)
        place.account.advance()
        if len(place.account.machines) == 2:
            place.says(stage="done", ended="failed", cause="out_of_memory", sentence="a GPU ran out of memory")

    state = watch(place.store, "job-1", place.backend, out, logs=True, now=place.clock.now, sleep=sleep)
    assert (state.state, state.sentence) == ("failed", "a GPU ran out of memory")
    said, taken = (
        out.getvalue().splitlines(),
        "its machine was taken back; asking for another, to go on from the newest",
    )
    assert sum(line.startswith(taken) for line in said) == 2
    assert any("InsufficientInstanceCapacity" in line for line in said)
    (second,) = place.account.alive()
    assert f"  | {first}: hello" in said
    assert f"  | {second}: from a machine" in said


def test_who_watches_asks_once_for_each_machine_that_was_taken_back(place: Place) -> None:
    """The minute after is spent on the new machine, not on what is known of the old one."""
    first, sleeps = place.launch(), []
    place.clock.jump(MINUTE)
    place.says()
    place.account.end(first, "Server.SpotInstanceTermination")

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        place.clock.jump(seconds)
        place.account.advance()
        if len(sleeps) == 2:
            place.says(stage="done", ended="failed", cause="out_of_memory", sentence="a GPU ran out of memory")

    state = watch(place.store, "job-1", place.backend, io.StringIO(), now=place.clock.now, sleep=sleep)
    assert (state.state, sleeps) == ("failed", [60.0, 1.0])
    assert [(entry.what, entry.note) for entry in verify(chain_store(place.store)).entries] == [("launch", "again")]


def test_a_notice_that_is_heeded_is_followed_by_one_machine_and_an_old_notice_by_none(place: Place) -> None:
    """The container saves and exits, its user data shuts the machine down before AWS takes it: so EC2 says."""
    first = place.launch()
    place.heeds_a_notice(first)
    assert place.tick() == ["job-1: launched again: its machine was taken back"]
    (second,) = place.account.alive()
    place.clock.jump(MINUTE)
    assert place.tick() == []
    place.account.end(second, "Client.InstanceInitiatedShutdown")  # of its own accord, before its first word
    place.clock.jump(MINUTE)
    assert place.tick() == []
    assert len(place.account.machines) == 2


def test_who_watches_follows_a_notice_that_is_heeded_with_another_machine(place: Place) -> None:
    place.heeds_a_notice(place.launch())

    def sleep(seconds: float) -> None:
        place.clock.jump(seconds)
        if len(place.account.machines) == 2:
            place.says(stage="done", ended="failed", cause="out_of_memory", sentence="a GPU ran out of memory")

    state = watch(place.store, "job-1", place.backend, io.StringIO(), now=place.clock.now, sleep=sleep)
    assert (state.state, len(place.account.machines)) == ("failed", 2)


def test_a_job_that_is_past_its_cap_is_not_launched_again(place: Place) -> None:
    place.spec = place.spec.model_copy(update={"cap_usd": 1.0})
    first = place.launch()
    place.clock.jump(40 * MINUTE)
    place.says()
    place.account.end(first, "Server.SpotInstanceTermination")
    place.clock.jump(MINUTE)
    assert place.tick() == []
    assert place.account.alive() == []


def test_the_reaper_ends_an_overdue_machine_of_ours(place: Place) -> None:
    place.launch()
    assert place.decided() == []
    place.clock.jump(3600 + MINUTE)
    assert place.decided() == [("stop", "lorry-job-1")]
    assert place.account.alive() == []
    place.clock.jump(MINUTE)
    assert place.decided() == []


@pytest.mark.parametrize("first", ["runpod_pod", "ec2"])
def test_providers_that_do_not_answer_keep_no_machine_of_another_alive(
    first: str, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place.launch()
    place.clock.jump(3600 + MINUTE)
    place.account.faults.append(Fault("describe_volumes", "UnauthorizedOperation", times=9))  # only a report asks
    nowhere = {"RUNPOD_API_KEY": "k", "RUNPOD_API_BASE_URL": "http://127.0.0.1:9"}
    silent = RunpodPodBackend(nowhere, sleep=lambda seconds: None)
    order = ("runpod_pod", "ec2") if first == "runpod_pod" else ("ec2", "runpod_pod")
    monkeypatch.setattr("scripts.backends.rented", lambda environment: order)
    monkeypatch.setattr("scripts.backends.open_backend", lambda name, _: place.backend if name == "ec2" else silent)
    monkeypatch.setattr("scripts.cli.money.time", SimpleNamespace(time=place.clock.now))
    for name, value in {**nowhere, "LORRY_STORE": place.store.url.partition("/clients/")[0]}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["reap", "--yes", "--json"]) == ProviderError.exit_code
    assert place.account.alive() == []
    said = capsys.readouterr()
    troubles = json.loads(said.out)["troubles"]
    assert set(troubles) == {"runpod_pod", "ec2 report"}
    assert "UnauthorizedOperation" in troubles["ec2 report"]
    assert [problem["where"] for problem in json.loads(said.err)["problems"]] == list(troubles)


@pytest.mark.parametrize("tag", ["Name", "lorry_job", "expires_at"])
def test_what_lacks_one_of_our_marks_is_reported_and_never_ended(tag: str, place: Place) -> None:
    machine = place.account.machines[place.launch()]
    machine.row["Tags"] = [row for row in machine.row["Tags"] if row["Key"] != tag]
    place.clock.jump(9 * 3600)
    (action, name), *more = place.decided()
    assert (action, more) == ("report", [])
    assert machine.row["InstanceId"] in name
    assert place.account.alive() == [machine.row["InstanceId"]]


def test_a_machine_of_a_job_that_nobody_launched_is_reported(place: Place) -> None:
    backend = place.backend
    backend.submit(place.spec, backend.request(place.spec))
    place.clock.jump(9 * 3600)
    assert place.decided() == [("report", "lorry-job-1")]
    assert len(place.account.alive()) == 1


def test_a_disk_that_no_machine_uses_is_reported_with_its_price(place: Place) -> None:
    place.account.volumes = [
        {"VolumeId": "vol-1", "Size": 200, "State": "available"},
        {"VolumeId": "vol-2", "Size": 200, "State": "in-use"},
    ]
    (one,) = place.backend.forgotten()
    assert (one.name, one.usd_per_month) == ("disk vol-1", 16.0)
