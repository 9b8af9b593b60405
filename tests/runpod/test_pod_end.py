"""The end of a machine from inside: its own key, else the front door, else it holds and never exits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from scripts.backends.runpod_api import RunpodApi
from scripts.container.gpu_probe import Idleness
from scripts.container.pod_end import INTERRUPTED, START_SECONDS, end_of_pod, run_in_pod
from scripts.errors import Conflict, InputError, Problem, ProviderError
from scripts.fake_runpod.clock import Clock
from scripts.fake_runpod.host import Host
from scripts.fake_runpod.server import Fault, LocalRunpod, serve
from tests.runpod.conftest import KEY, OPENAPI

POD = {
    "name": "lorry-job-1",
    "image": "i",
    "args": "python -m scripts.container",
    "gpu": {"id": "NVIDIA H200", "count": 1},
}


class Held(Exception):
    """The container waits."""


class Nobody:
    """A runner that only remembers the environment it was given."""

    environment: dict[str, str]

    def start(self, pod_id: str, command: Any, environment: Any, folder: Path) -> Any:
        self.environment = dict(environment)
        return self

    def exit_code(self) -> None:
        return None

    def lines(self) -> list[str]:
        return []

    def end(self, *, at_once: bool = False) -> None:
        return


@dataclass
class Pod:
    runpod: LocalRunpod
    environment: dict[str, str]
    pod_id: str
    waits: list[float] = field(default_factory=list)

    def end(self, most_waits: int = 1, **environment: str) -> None:
        """Calls the end until it has waited so often for its Pod to go."""

        def sleep(seconds: float) -> None:
            if seconds >= 15:
                self.waits.append(seconds)
                if len(self.waits) >= most_waits:
                    raise Held

        end = end_of_pod(self.environment | environment, "job-1")
        assert end is not None
        object.__setattr__(end, "sleep", sleep)
        with pytest.raises(Held):
            end()

    @property
    def is_gone(self) -> bool:
        return self.pod_id not in self.runpod.account.held["pods"]


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Pod]:
    runner = Nobody()
    with serve(KEY, OPENAPI, host=Host(tmp_path, runner), clock=Clock(1_800_000_000.0)) as runpod:
        with RunpodApi(KEY, runpod.url) as api:
            pod_id = api.create("pods", POD)["id"]
        for _ in range(3):
            runpod.advance()
        yield Pod(runpod, runner.environment, pod_id)


@pytest.fixture
def front_door() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    asked: list[tuple[str, str]] = []

    class Door(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append((self.path, self.headers["authorization"]))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Door)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def test_a_pod_ends_itself_with_its_own_key(pod: Pod) -> None:
    pod.end()
    assert pod.is_gone
    assert pod.environment["RUNPOD_API_KEY"] != KEY


def test_an_answer_after_which_it_still_runs_leads_to_the_front_door(
    pod: Pod, front_door: tuple[str, list[tuple[str, str]]]
) -> None:
    url, asked = front_door
    pod.runpod.faults.append(Fault("DELETE", "/v2/pods/", 404, times=9))  # a key that does not see what it should end
    pod.end(most_waits=1, LORRY_FRONT_DOOR=url, LORRY_JOB_TOKEN="t")
    assert asked == [], "it may have been ended"
    pod.waits.clear()
    pod.end(most_waits=2, LORRY_FRONT_DOOR=url, LORRY_JOB_TOKEN="t")
    assert asked == [("/machines/job-1/end", "Bearer t")]


def test_the_key_of_a_pod_can_do_nothing_else(pod: Pod) -> None:
    with RunpodApi(KEY, pod.runpod.url) as owner:
        other = owner.create("pods", POD)["id"]
    key = pod.environment["RUNPOD_API_KEY"]
    with RunpodApi(key, pod.runpod.url) as inside:
        for method, path, body in (
            ("GET", "/pods", None),
            ("POST", "/pods", POD),
            ("DELETE", f"/pods/{other}", None),
            ("GET", "/account/secrets", None),
            ("POST", f"/pods/{pod.pod_id}/action", {"action": "stop"}),
        ):
            with pytest.raises(ProviderError, match="status 403"):
                inside.ask(method, path, body)
        assert inside.ask("GET", f"/pods/{pod.pod_id}")["id"] == pod.pod_id


def test_trouble_of_the_platform_is_outwaited(pod: Pod) -> None:
    pod.runpod.faults.append(Fault("DELETE", "/v2/pods/", 500, times=4))
    pod.end()
    assert pod.is_gone


def test_a_pod_that_may_not_end_itself_asks_the_front_door(pod: Pod, front_door: Any, capfd: Any) -> None:
    pod.runpod.pod_keys_work = False
    url, asked = front_door
    pod.end(LORRY_FRONT_DOOR=url, LORRY_JOB_TOKEN="a.token.of.it")
    assert asked == [("/machines/job-1/end", "Bearer a.token.of.it")]
    said = capfd.readouterr().err
    assert "this Pod could not end itself" in said
    assert "a.token" not in said
    assert pod.environment["RUNPOD_API_KEY"] not in said


def test_a_pod_that_nobody_ends_holds_and_asks_again_ever_more_rarely(pod: Pod, capfd: Any) -> None:
    pod.runpod.pod_keys_work = False
    pod.end(most_waits=7)
    assert pod.waits == [15, 30, 60, 120, 240, 300, 300]
    assert not pod.is_gone
    assert "holding, since a restart would cost as much" in capfd.readouterr().err
    pod.runpod.pod_keys_work = True
    pod.end(most_waits=8)
    assert pod.is_gone


def test_only_a_pod_of_ours_is_ended(pod: Pod) -> None:
    assert end_of_pod({}, "job-1") is None
    assert end_of_pod(pod.environment | {"RUNPOD_ENDPOINT_ID": "ep1"}, "job-1") is None, "a queue worker"


def run_with(outcomes: list[Any], environment: dict[str, str] | None = None) -> tuple[int, list[str]]:
    """The exit code of a container with these outcomes, one per start, and what happened in order."""
    happened: list[str] = []
    clock = [0.0]

    def run() -> int:
        outcome = outcomes.pop(0) if len(outcomes) > 1 else outcomes[0]
        happened.append("run")
        if isinstance(outcome, Exception):
            raise outcome
        return int(outcome)

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    code = run_in_pod(run, lambda: happened.append("end"), environment or {}, now=lambda: clock[0], sleep=sleep)
    return code, happened


SILENT = ProviderError(Problem("store", "silent", "wait"))


@pytest.mark.parametrize(
    ("outcomes", "code", "happened"),
    [
        ([0], 0, ["run", "end"]),
        ([25], 25, ["run", "end"]),
        ([INTERRUPTED], INTERRUPTED, ["run"]),
        ([Conflict(Problem("a", "b", "c"))], 5, ["run"]),
        ([InputError(Problem("a", "b", "c"))], 2, ["run", "end"]),
        ([RuntimeError("a fault")], 1, ["run", "end"]),
        ([SILENT, SILENT, 0], 0, ["run", "run", "run", "end"]),
        ([SILENT], 8, ["run"] * (int(START_SECONDS / 15) + 1) + ["end"]),
    ],
    ids=["done", "failed", "told to end", "another is at it", "wrong input", "fault", "silent store", "no store"],
)
def test_every_way_out_but_a_word_to_the_machine_ends_the_pod(
    outcomes: list[Any], code: int, happened: list[str], capfd: Any
) -> None:
    assert run_with(outcomes) == (code, happened)


def test_a_secret_that_was_not_filled_in_ends_the_pod_before_anything_runs(capfd: Any) -> None:
    code, happened = run_with([0], {"AWS_ACCESS_KEY_ID": "{{ RUNPOD_SECRET_store_id }}"})
    assert (code, happened) == (2, ["end"])
    assert "AWS_ACCESS_KEY_ID: a secret that was not filled in" in capfd.readouterr().err


def test_gpus_that_idle_for_too_long_are_noticed_and_unknown_ones_are_not() -> None:
    says: list[bool | None] = [True, False, False, None, False]
    idleness = Idleness(lambda: says.pop(0) if len(says) > 1 else says[0], limit_seconds=100, now=0.0)
    seen = [idleness.exhausted(float(now)) for now in range(0, 300, 30)]
    assert seen == [False, False, False, False, False, False, False, False, True, True]
    unknown = Idleness(lambda: None, limit_seconds=100, now=0.0)
    assert not any(unknown.exhausted(float(now)) for now in range(0, 10_000, 30))
