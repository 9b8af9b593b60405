"""A world on a fake clock: launchers that die, a SageMaker that fails, containers that write real job files.

world = World(seed, folder); ended = world.live(); world.found        # every promise that was broken
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import botocore.endpoint
import pytest
from botocore.awsrequest import AWSResponse
from botocore.exceptions import ConnectionClosedError

from recipes.job import Record
from scripts.adapter import MANIFEST, verify_adapter
from scripts.backends.aws import aws_client
from scripts.backends.sagemaker import SageMakerBackend
from scripts.cost import settle
from scripts.errors import LorryError, ProviderError, Refused
from scripts.fake_runpod.clock import Clock
from scripts.job_folder import read_job
from scripts.launch import launch
from scripts.overstay import ENDED_SECONDS
from scripts.state import JobState, job_state
from scripts.stop import stop_job
from scripts.store import FileStore, open_store
from scripts.tick import Hands, Room, tick
from scripts.watch import watch
from tests.runpod.conftest import data_in
from tests.runpod.world import (
    EPOCH,
    LONGEST_SECONDS,
    STOPPED_TICKS,
    Endless,
    Killed,
    ReplayContainer,
    script_of,
    send_the_reaper,
)
from tests.sagemaker.conftest import KEYS, SETTINGS, STORE, spec_of
from tests.sagemaker.fake_sagemaker import ENDED, REGION, SPOT_SHARE, Fault, Mishap, SageMaker
from tests.sagemaker.wire import Broken

TICK_SECONDS = 20.0
PRICE = 7.912
NO_DEADLINE = {"LORRY_DEADLINE": str(10**11)}
"Only Pods are told one; here the platform has its own limit."


class JobContainer(ReplayContainer):
    """The container of a training job: it ends by ending, and saves when it is told to, unless it hangs by then."""

    def __init__(self, world: Any, job: Path) -> None:
        super().__init__(world, job, NO_DEADLINE)
        self.hangs_at = self.at + world.hangs_after
        if self.end_at is not None:  # the job has ended already
            self.leave(0)

    def act(self) -> None:
        if self.world.clock.now() < self.hangs_at:
            super().act()

    def end(self, *, at_once: bool = False) -> None:
        if not at_once and self.world.clock.now() >= self.hangs_at:
            return
        if not at_once and self.code is None and self.state.stage == "training":
            self.do_training(self.world.clock.now())
            step = read_job(self.world.store, "job-1").status
            if step is not None and step.step:
                self.world.store.write(f"job-1/checkpoints/step-{step.step:06d}/COMPLETE", b"")
        stop = read_job(self.world.store, "job-1").stop
        if not at_once and stop is not None and self.state.ended is None:
            self.finish("cancelled" if stop.by == "user" else "failed", "cancelled", f"stopped by {stop.by}")
        super().end(at_once=at_once)

    def finish(self, ended: str, cause: str | None, sentence: str) -> None:
        super().finish(ended, cause, sentence)
        self.leave(20 if cause else 0)

    def leave(self, code: int) -> None:
        """Exits, or hangs when it should."""
        if self.world.script.keys_work:
            self.code = code
        else:
            self.hangs_at = 0.0


class Mortal(SageMakerBackend):
    """The backend of a launcher that is killed before or after its request."""

    def __init__(self, settings: Mapping[str, str], moment: str, clients: dict[str, Any]) -> None:
        super().__init__(settings)
        self._clients, self.moment = clients, moment

    def _create(self, body: Mapping[str, Any]) -> bool:
        if self.moment == "before":
            raise Killed
        made = super()._create(body)
        if self.moment == "after":
            raise Killed
        return made


@dataclass
class World:
    """One job, its launchers, its SageMaker. `found`: the promises that were broken."""

    seed: int
    folder: Path
    found: list[str] = field(default_factory=list)
    containers: list[JobContainer] = field(default_factory=list)
    ticks: int = 0
    stopped_ticks: int = 0
    "For how long a training job has gone on although its job was stopped."

    def __post_init__(self) -> None:
        chance = random.Random(f"sagemaker {self.seed}")
        self.script = script_of(self.seed)
        self.script = replace(self.script, jumps=self.script.jumps if chance.random() < 0.5 else {})
        self.spot = chance.random() < 0.5
        self.clock = Clock(EPOCH)
        store = open_store((self.folder / "store").as_uri())
        assert isinstance(store, FileStore)
        self.store = store
        self.account = SageMaker(self.folder / "hosts", self, clock=self.clock)
        self.account.mishaps += [_mishap(chance, self.spot) for _ in range(chance.choice([0, 1, 2, 3]))]
        self.account.faults += [_fault(chance) for _ in range(chance.choice([0, 1, 2, 4]))]
        deadline, steps = self.script.deadline_seconds, self.script.steps
        self.spec = spec_of("job-1", STORE, deadline_seconds=deadline, steps=steps, cap_usd=PRICE * deadline / 3600)
        self.deaths = list(self.script.deaths)
        self.hangs_after = chance.uniform(0, 300) if chance.random() < 0.1 else float("inf")
        if self.hangs_after < float("inf"):
            self.script = replace(self.script, user_stops_at=chance.uniform(100, 900))

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> Any:
        """The runner of the account: starts the container of a training job."""
        told = {"TRAINING_JOB_NAME": name, "LORRY_JOB": "job-1", "LORRY_STORE": STORE}
        if not told.items() <= environment.items() or set(environment) & set(KEYS):
            self.found.append("the container was not told what it must know, or a key")
        self.containers.append(JobContainer(self, folder))
        return self.containers[-1]

    def write(self, name: str, record: Record) -> None:
        self.store.write(f"job-1/{name}", record.model_dump_json().encode())

    def pass_time(self, seconds: float) -> None:
        """Everything that happens in so many seconds."""
        until = self.clock.now() + seconds
        while (left := until - self.clock.now()) > 0:
            self.clock.jump(min(TICK_SECONDS, left))
            self.ticks += 1
            jump = self.script.jumps.get(self.ticks, 0.0)
            self.clock.jump(jump)
            until += jump
            self.account.advance()
            for container in list(self.containers):
                if container.code is None:
                    container.act()
                else:
                    self.containers.remove(container)
            self.look()

    def look(self) -> None:
        """What must hold at every moment."""
        alive = [job.name for job in self.account.jobs.values() if job.status not in ENDED]
        if len(alive) > 1:
            self.found.append(f"{len(alive)} training jobs at once")
        stopped = bool(alive) and self.store.read("job-1/stop.json") is not None
        self.stopped_ticks = self.stopped_ticks + 1 if stopped else 0
        if self.stopped_ticks > STOPPED_TICKS:
            self.found.append("a training job goes on although its job was stopped")
        if self.store.read(f"job-1/adapter/{MANIFEST}") is not None:
            try:
                verify_adapter(self.store.root / "job-1" / "adapter")
            except LorryError as error:
                self.found.append(f"a manifest before the adapter was whole: {error}")

    def launcher(self, moment: str = "never") -> Mortal:
        settings = SETTINGS | {"LORRY_SAGEMAKER_SPOT": "yes" if self.spot else "no"}
        return Mortal(settings, moment, _clients())

    def live(self) -> str:
        """From the first launch to the last cent; returns how the job ended."""
        with speaking_to(self.account):
            return self._live()

    def _live(self) -> str:
        data = data_in(self.folder / "data")
        ended = "stuck"
        for _ in range(40):
            try:
                backend = self.launcher(self.deaths.pop(0) if self.deaths else "never")
                launch(self.store, self.spec, None, data, backend, self.clock.now())
                state = self.watch(backend)
            except Killed:
                self.pass_time(5.0)
                continue
            except Refused as refused:
                ended = "refused" if str(refused) else "refused without a reason"
                break
            except ProviderError:
                self.pass_time(60.0)
                continue
            except Endless:
                break
            if state.state != "lost":
                ended = state.state if state.sentence else f"{state.state} without a reason"
                break
        self.settle(ended)
        return ended

    def watch(self, backend: SageMakerBackend) -> JobState:
        def sleep(seconds: float) -> None:
            self.pass_time(seconds)
            if self.stopped_ticks > STOPPED_TICKS or self.clock.now() > EPOCH + LONGEST_SECONDS:
                raise Endless
            due = self.script.user_stops_at
            if due is not None and self.clock.now() > EPOCH + due:
                stop_job(self.store, "job-1", backend, "user", "enough", self.clock.now())

        return watch(self.store, "job-1", backend, io.StringIO(), poll_seconds=90.0, now=self.clock.now, sleep=sleep)

    def settle(self, ended: str) -> None:
        """What must hold at the end, when the reaper too has been by."""
        self.account.faults.clear()
        self.pass_time(180.0)
        backend = self.launcher()
        if backend.owned():
            self.pass_time(ENDED_SECONDS)
            send_the_reaper(backend, self.store, STORE, self.clock.now())
            self.pass_time(180.0)
        if any(job.status not in ENDED for job in self.account.jobs.values()):
            self.found.append("a training job is left")
        files = read_job(self.store, "job-1")
        if ended not in ("completed", "failed", "cancelled", "refused"):
            self.found.append(f"it ended as {ended}")
        if ended == "cancelled" and self.script.user_stops_at is None:
            self.found.append("cancelled although nobody did")
        if files.container is not None and files.container.ended == "failed" and not files.container.cause:
            self.found.append("failed without a cause")
        if (ended == "completed") != (files.manifest is not None):
            self.found.append(f"{ended}, and the manifest is {'there' if files.manifest else 'not there'}")
        now = self.clock.now()
        report = tick([Room(self.store)], Hands(lambda name: backend, backend.charges, self.clock.now))
        self.found += [f"a tick was in trouble: {trouble}" for trouble in report.troubles]
        settlement = settle(self.store, files, job_state(files, None, now), backend.charges, now)
        if settlement is None or abs(settlement.usd - self.bill()) > 1e-5 or not settlement.is_final:
            self.found.append(f"the ledger is not the bill of ${self.bill():.4f}: {settlement}")
        said = json.dumps(self.account.log).encode()
        files_here = [path.read_bytes() for path in self.store.root.rglob("*") if path.is_file()]
        if any(key.encode() in data for key in KEYS.values() for data in (said, *files_here)):
            self.found.append("a key in a request or a file")

    def bill(self) -> float:
        share = SPOT_SHARE if self.spot else 1.0
        jobs = self.account.jobs.values()
        return sum(int(job.used(self.clock.now()) * share) / 3600 * PRICE for job in jobs)


def _mishap(chance: random.Random, spot: bool) -> Mishap:
    kinds = ["no_capacity", "internal", *(["interrupt"] * 3 if spot else [])]
    return Mishap(chance.choice(kinds), chance.uniform(0, 600))


def _fault(chance: random.Random) -> Fault:
    actions = ["CreateTrainingJob", "CreateTrainingJob", "DescribeTrainingJob", "StopTrainingJob", "ListTrainingJobs"]
    action, times, done = chance.choice(actions), chance.randint(1, 6), chance.random() < 0.5
    if chance.random() < 0.3:
        return Fault(action, 400, "ThrottlingException", times)
    if action == "CreateTrainingJob" and chance.random() < 0.3:
        return Fault(action, 400, "ResourceLimitExceeded", times)
    return Fault(action, chance.choice([0, 500, 503]), "InternalFailure", times, carried_out=done)


@lru_cache(maxsize=1)
def _clients() -> dict[str, Any]:
    """One client for all worlds: making one costs a tenth of a second."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        return {"sagemaker": aws_client("sagemaker", REGION)}


@contextmanager
def speaking_to(account: SageMaker) -> Iterator[None]:
    """botocore hands its requests to this account, with all of its own checks and retries, and waits on its clock."""
    client = _clients()["sagemaker"]

    def send(request: Any, **_: Any) -> AWSResponse:
        target = request.headers["X-Amz-Target"]
        try:
            status, body = account.answer(
                target.decode() if isinstance(target, bytes) else target, json.loads(request.body)
            )
        except Broken:
            raise ConnectionClosedError(endpoint_url=request.url) from None
        return AWSResponse(request.url, status, {"Content-Type": "application/x-amz-json-1.1"}, _Raw(json.dumps(body)))

    client.meta.events.register_first("before-send.sagemaker", send, unique_id="local")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.endpoint, "time", SimpleNamespace(sleep=account.clock.jump))
        try:
            yield
        finally:
            client.meta.events.unregister("before-send.sagemaker", send, unique_id="local")


class _Raw(io.BytesIO):
    def __init__(self, text: str) -> None:
        super().__init__(text.encode())

    def stream(self, *_: Any, **__: Any) -> Iterator[bytes]:
        yield self.read()
