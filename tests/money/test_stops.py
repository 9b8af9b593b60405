"""Three stops for money, each alone and in every company: the Pod is gone before the bill passes the cap by 5 %."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from recipes.job import Submission
from scripts.container.pod_end import PodEnd, end_of_pod
from scripts.fake_runpod.clock import Clock
from scripts.fake_runpod.host import Host
from scripts.fake_runpod.server import serve
from scripts.reap import World, judge, look, reap
from scripts.store import open_store
from tests.money.conftest import KEY, Place
from tests.money.jobs import HOUR, PRICE, Life

HOURS = 4
CAP_USD = HOURS * PRICE
EVERY_SECONDS = 300.0
"How often somebody looks, and how often the reaper comes: 2 % of the limit."

STOPS = ("inside", "contact", "schedule")
TROUBLES = ("talks", "mute", "unrecorded")
ALONE = [({stop}, trouble) for stop in STOPS for trouble in TROUBLES]
IN_COMPANY = [(set(chosen), "talks") for size in (2, 3) for chosen in itertools.combinations(STOPS, size)]


class Held(Exception):
    """The container waits for its Pod to end."""


@dataclass
class Container:
    """A container that never finishes. `ends`: whether its own stop works; `is_mute`: after a first word it reaches no
    store."""

    life: Life
    environment: Mapping[str, str]
    clock: Clock
    ends: bool
    is_mute: bool
    code: int | None = None
    has_spoken: bool = False
    started_at: float = field(init=False)

    def __post_init__(self) -> None:
        self.started_at = self.clock.now()

    def act(self) -> None:
        """What it does at this moment: a heartbeat, and its own stop when it is due."""
        now = self.clock.now()
        over = min(self.started_at + HOURS * HOUR, float(self.environment["LORRY_DEADLINE"]))
        if not self.is_mute or not self.has_spoken:
            self.life.runs(now, since=self.started_at)
            self.has_spoken = True
        if self.ends and now >= over:
            if not self.is_mute:
                self.life.failed(now, since=self.started_at, sentence="the time limit was reached")
            self._end_pod()

    def exit_code(self) -> int | None:
        return self.code

    def lines(self) -> list[str]:
        return []

    def end(self, *, at_once: bool = False) -> None:
        self.code = -15

    def _end_pod(self) -> None:
        end = end_of_pod(self.environment, self.life.job_id)
        assert end is not None

        def sleep(seconds: float) -> None:
            raise Held

        try:
            PodEnd(**{**vars(end), "sleep": sleep})()
        except Held:
            return


@dataclass
class Containers:
    """The machines' runner: every container it starts is one of the above."""

    place: Place | None = None
    ends: bool = True
    is_mute: bool = False
    started: list[Container] = field(default_factory=list)

    def start(self, pod_id: str, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> Container:
        assert self.place is not None
        life = Life(self.place.store, environment["LORRY_JOB"])
        self.started.append(Container(life, environment, self.place.clock, self.ends, self.is_mute))
        return self.started[-1]


@pytest.fixture
def machines(tmp_path: Path, place: Place) -> Iterator[Place]:
    """The same place, with containers in its Pods."""
    runner = Containers()
    host = Host(tmp_path / "host", runner, provisioning_seconds=120.0, starting_seconds=180.0)
    with serve(KEY, clock=place.clock, host=host) as local:
        runner.place = Place(place.store, local, place.clock, place.data)
        yield runner.place


def killed_after_the_create(place: Place) -> None:
    """A launcher that dies before it could write down which Pod it got."""
    place.store.write("job-1/submission.json", _without_handle(place))


def _without_handle(place: Place) -> bytes:
    known = Submission.model_validate_json(place.store.read("job-1/submission.json") or b"")
    return known.model_copy(update={"handle": {}}).model_dump_json().encode()


@pytest.mark.parametrize(
    ("company", "trouble"),
    [*ALONE, *IN_COMPANY],
    ids=lambda value: value if isinstance(value, str) else "+".join(sorted(value)),
)
def test_any_one_stop_is_enough(machines: Place, company: set[str], trouble: str) -> None:
    place = machines
    assert place.local.host is not None
    runner = place.local.host.runner
    assert isinstance(runner, Containers)
    runner.ends, runner.is_mute = "inside" in company, trouble == "mute"
    place.launch(deadline_seconds=HOURS * 3600, cap_usd=CAP_USD)
    if trouble == "unrecorded":
        killed_after_the_create(place)
    pods = list(place.local.account.held["pods"])
    quiet = [EVERY_SECONDS, HOUR, HOUR, HOUR, 2400.0]  # up to 3.8 h: nobody may end it yet
    for seconds in quiet:
        _pass(place, runner, seconds, company)
        assert place.pods() == ["lorry-job-1"]
    for _ in range(24):
        _pass(place, runner, EVERY_SECONDS, company)
    assert place.pods() == []
    assert len(runner.started) == 1
    spent = sum(place.local.account.meter.total(pod, place.clock.now()) for pod in pods)
    assert 0.95 * CAP_USD < spent <= 1.05 * CAP_USD
    place.rest(12 * HOUR)
    assert sum(place.local.account.meter.total(pod, place.clock.now()) for pod in pods) == spent


def _pass(place: Place, containers: Containers, seconds: float, company: set[str]) -> None:
    """So much time, in which the containers act; then whoever is awake looks."""
    place.rest(seconds)
    for _ in range(3):
        place.local.advance()
    for container in containers.started:
        if container.code is None:
            container.act()
    place.local.advance()
    if "contact" in company:
        place.tick()
    if "schedule" in company:
        backends = {"runpod_pod": place.backend}
        found = look(backends, open_store, lambda url: url == place.store.url)
        reap(judge(World(tuple(found)), place.clock.now()), backends, open_store, place.clock.now())
