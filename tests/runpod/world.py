"""A world on a fake clock: launchers that die, a Runpod that fails, Pods whose containers write real job files.

world = World(seed, runpod, folder); found = world.live()      # every promise that was broken
"""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes.job import Attempt, ContainerState, Proof, Record, Result, Status
from scripts.adapter import MANIFEST, verify_adapter, write_manifest
from scripts.backends.base import Backend
from scripts.backends.runpod_pod import RunpodPodBackend
from scripts.backends.runpod_pod_claims import PodClaims
from scripts.container.pod_end import PodEnd, end_of_pod
from scripts.errors import LorryError, ProviderError, Refused
from scripts.fake_runpod.account import Account
from scripts.fake_runpod.clock import Clock
from scripts.fake_runpod.host import Host, Mishap
from scripts.fake_runpod.pods import NO_CAPACITY
from scripts.fake_runpod.server import Fault, LocalRunpod
from scripts.job_folder import read_job, upload_folder
from scripts.launch import launch
from scripts.overstay import ENDED_SECONDS
from scripts.reap import World as Seen
from scripts.reap import judge, look, reap
from scripts.state import JobState, job_state
from scripts.stop import stop_job
from scripts.store import FileStore, Store, open_store
from scripts.watch import watch
from tests.container.replay_trainer import tensors
from tests.runpod.conftest import IMAGE, KEY, data_in, spec_of

EPOCH = 1_800_000_000.0
TICK_SECONDS = 15.0
CANARY = "CANARY-secret-value"
PRICES = (1.79, 1.79, 1.79, 1.6, 1.6, 2.2)
A100 = ("NVIDIA A100 80GB PCIe", "NVIDIA A100-SXM4-80GB")
HANG_SECONDS = 600.0
STOPPED_TICKS = 60
"So long a machine may outlive the stop of its job: EC2's waits ten minutes for its launch file before it ends itself."
LONGEST_SECONDS = 2 * 86_400.0
MOST_ATTEMPTS = 5


class Killed(BaseException):
    """kill -9 of the launcher."""


class Endless(Exception):
    """The job never comes to its end."""


class Held(Exception):
    """The container waits for its Pod to end."""


@dataclass(frozen=True)
class Script:
    """What happens in the world of one seed."""

    steps: int
    step_seconds: float
    checkpoint_steps: int
    deadline_seconds: int
    trouble: Mapping[int, tuple[str, int]]
    "attempt -> (what, at which step)"
    faults: list[Fault]
    mishaps: list[Mishap]
    deaths: list[str]
    "Where the launchers die, one after the other."
    jumps: dict[int, float]
    "tick -> seconds by which the clock jumps."
    user_stops_at: float | None
    keys_work: bool
    proof_passes: bool
    price: float


def script_of(seed: int) -> Script:
    chance = random.Random(seed)
    steps = chance.randint(4, 30)
    kinds = ["crash", "kill", "hang", "out_of_memory", "none", "none"]
    trouble = {n: (chance.choice(kinds), chance.randint(0, steps)) for n in range(1, 5) if chance.random() < 0.4}
    return Script(
        steps=steps,
        step_seconds=chance.choice([5.0, 20.0, 40.0]),
        checkpoint_steps=chance.randint(1, 6),
        deadline_seconds=chance.choice([900, 3600, 3600, 7200]),
        trouble=trouble,
        faults=[random_fault(chance) for _ in range(chance.choice([0, 1, 2, 4]))],
        mishaps=[_mishap(chance) for _ in range(chance.choice([0, 0, 1, 2, 3]))],
        deaths=[chance.choice(["before", "after", "never"]) for _ in range(chance.choice([0, 0, 1, 2]))],
        jumps={chance.randint(1, 60): chance.choice([-30.0, 120.0, 1800.0]) for _ in range(chance.choice([0, 0, 1]))},
        user_stops_at=chance.uniform(30, 900) if chance.random() < 0.1 else None,
        keys_work=chance.random() < 0.85,
        proof_passes=chance.random() < 0.93,
        price=chance.choice(PRICES),
    )


def random_fault(chance: random.Random) -> Fault:
    method, path = chance.choice(
        [("POST", "/v2/pods$"), ("POST", "/v2/pods$"), ("GET", "/v2/pods"), ("DELETE", "/v2/pods/"), ("GET", "/v2/cat")]
    )
    if (method, chance.random() < 0.3) == ("POST", True):
        return Fault(method, path, 400, NO_CAPACITY, times=chance.randint(1, 4))
    status, done = chance.choice([0, 429, 500, 502, 503]), chance.random() < 0.5
    headers = {"Retry-After": "3"} if status == 429 else {}
    return Fault(method, path, status, headers=headers, times=chance.randint(1, 3), carried_out=done and status != 429)


def _mishap(chance: random.Random) -> Mishap:
    return Mishap(chance.choice(["stuck", "error", "vanish", "kill", "kill", "stop"]), chance.uniform(0, 600))  # type: ignore[arg-type]


class ReplayContainer:
    """Plays the container of scripts.container in a Pod: the same files in the same order, one act per tick."""

    def __init__(self, world: World, job: Path, environment: Mapping[str, str]) -> None:
        self.world, self.work, self.environment = world, job, environment
        self.code: int | None = None
        self.end_at: float | None = None
        self.pause = 15.0
        data = world.store.read("job-1/container.json")
        now = world.clock.now()
        fresh = ContainerState(job_id="job-1", stage="fetching", updated_at=now, started_at=now, pid=1)
        self.state = ContainerState.model_validate_json(data) if data else fresh
        self.at, self.sent = now, 0
        if self.state.ended or world.store.read(f"job-1/adapter/{MANIFEST}"):
            self.end_at = now
        else:
            self.note(stage="fetching")

    def exit_code(self) -> int | None:
        return self.code

    def lines(self) -> list[str]:
        return []

    def end(self, *, at_once: bool = False) -> None:
        self.code = -9 if at_once else 143

    def note(self, **changes: Any) -> None:
        now = self.world.clock.now()
        if changes.get("stage", self.state.stage) != self.state.stage:
            self.at = now
        self.state = self.state.model_copy(update={**changes, "updated_at": now})
        self.world.write("container.json", self.state)

    def act(self) -> None:
        """What it does in this tick."""
        now = self.world.clock.now()
        if self.end_at is not None:
            if now >= self.end_at:
                self.end_at, self.pause = now + self.pause, min(2 * self.pause, 300.0)
                self.end_pod()
            return
        limit = min(self.state.started_at + self.world.script.deadline_seconds, int(self.environment["LORRY_DEADLINE"]))
        stop = read_job(self.world.store, "job-1").stop
        if stop is not None:
            self.finish("cancelled" if stop.by == "user" else "failed", "cancelled", f"stopped by {stop.by}")
        elif now > limit:
            self.finish("failed", "deadline", "the time limit was reached")
        else:
            getattr(self, f"do_{self.state.stage}")(now)

    def do_fetching(self, now: float) -> None:
        attempts = self.state.attempts
        if len(attempts) >= MOST_ATTEMPTS:
            return self.finish("failed", "lost_rank", "it died at the same step again and again")
        done = [key.split("/")[2] for key in self.world.store.keys("job-1/checkpoints") if key.endswith("COMPLETE")]
        attempt = Attempt(number=len(attempts) + 1, started_at=now, resumed_from=max(done, default=None))
        self.note(stage="training", attempts=(*attempts, attempt))

    def do_training(self, now: float) -> None:
        script, attempt = self.world.script, self.state.attempts[-1]
        first = int((attempt.resumed_from or "step-0").rpartition("-")[2])
        spent = max(0.0, now - self.at)  # the clock may have been set back; a training only goes on
        step = min(script.steps, first + int(spent / script.step_seconds))
        kind, at = script.trouble.get(attempt.number, ("none", 0))
        if kind == "out_of_memory" and step >= at:
            return self.finish("failed", "out_of_memory", "a GPU ran out of memory")
        if kind == "kill" and step >= at:
            self.code = -9
            return
        if kind == "hang" and step >= at and now - self.at < HANG_SECONDS:
            return self.note()
        if kind in ("crash", "hang") and step >= at:
            return self.note(stage="fetching")
        for number in range(first + 1, step + 1):
            key = f"checkpoints/step-{number:06d}/COMPLETE"
            if number % script.checkpoint_steps == 0 and self.world.store.read(f"job-1/{key}") is None:
                self.world.store.write(f"job-1/{key}", b"")
        self.world.write("status.json", self.status(step, now))
        self.note(stage="proving" if step >= script.steps else "training")

    def do_proving(self, now: float) -> None:
        folder = self.work / "adapter"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        (folder / "adapter_model.safetensors").write_bytes(tensors(self.world.script.steps))
        if not self.world.script.proof_passes:
            return self.finish("failed", "no_effect", "the adapter does not change what the model says")
        self.note(stage="storing")

    def do_storing(self, now: float) -> None:
        """One file per tick, so that a blow may fall between any two of them."""
        folder, store = self.work / "adapter", self.world.store
        if not folder.is_dir():  # another machine proved it; this one has to train again
            return self.note(stage="fetching")
        names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
        if self.sent < len(names):
            store.put_file(folder / names[self.sent], f"job-1/adapter/{names[self.sent]}")
            self.sent += 1
            return
        hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
        spec, number = self.world.spec, self.state.attempts[-1].number
        result = Result(
            job_id="job-1", outcome="completed", exit_code=0, attempt=number, step=spec.total_steps,
            total_steps=spec.total_steps, adapter_sha256=hashes, base_sha256="0" * 64, trainable_parameters=4,
        )  # fmt: skip
        proof = Proof(
            job_id="job-1", passed=True, sentence="it changes the model", adapter_sha256=hashes, tensors=1,
            tensors_consumed=1, effect=0.5, reproduction_error=0.0, positions=4, seconds=0.1,
        )  # fmt: skip
        write_manifest(self.work, spec, result, proof, cost_usd=None, now=now)
        upload_folder(store, folder, "job-1/adapter", {})
        self.world.write("result.json", result)
        self.world.write("proof.json", proof)
        self.finish("completed", None, "")

    def finish(self, ended: str, cause: str | None, sentence: str) -> None:
        self.note(stage="done", ended=ended, cause=cause, sentence=sentence)
        self.end_at = self.world.clock.now()

    def end_pod(self) -> None:
        end = end_of_pod(self.environment, "job-1")
        assert end is not None

        def sleep(seconds: float) -> None:
            if seconds >= 15:
                raise Held

        try:
            PodEnd(**{**vars(end), "sleep": sleep})()
        except Held:
            return

    def status(self, step: int, now: float) -> Status:
        number, steps = self.state.attempts[-1].number, self.world.script.steps
        return Status(
            job_id="job-1", stage="training", attempt=number, updated_at=now, step=step, total_steps=steps,
            progress=100 * step // steps,
        )  # fmt: skip


@dataclass
class World:
    """One job, its launchers, its Runpod. `found`: the promises that were broken."""

    seed: int
    runpod: LocalRunpod
    folder: Path
    found: list[str] = field(default_factory=list)
    containers: list[ReplayContainer] = field(default_factory=list)
    ticks: int = 0
    stopped_ticks: int = 0
    "For how long a machine has been there although its job was stopped."

    def __post_init__(self) -> None:
        self.script = script_of(self.seed)
        self.clock = Clock(EPOCH)
        store = open_store((self.folder / "store").as_uri())
        assert isinstance(store, FileStore)
        self.store = store
        self.host = Host(self.folder / "host", self, self.runpod.url, 20.0, 20.0, mishaps=list(self.script.mishaps))
        account = Account(pod_life=("PROVISIONING",), hosted=True, clock=self.clock)
        dear = self.script.price > PRICES[0]
        account.catalog.prices = {gpu: self.script.price for gpu in A100[: 2 if dear else 1]}
        self.runpod.reset()
        self.runpod.account, self.runpod.host = account, self.host
        self.runpod.faults += self.script.faults
        self.runpod.pod_keys_work = self.script.keys_work
        account.held["secrets"] = {name: {"id": name, "name": name} for name in ("hf",)}
        account.secret_values["hf"] = CANARY
        deadline, steps = self.script.deadline_seconds, self.script.steps
        self.spec = spec_of("job-1", store.url, deadline_seconds=deadline, steps=steps)
        self.deaths = list(self.script.deaths)

    def start(self, pod_id: str, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> Any:
        """The runner of the host: starts the container of a Pod."""
        if environment["HF_TOKEN"] != CANARY:
            self.found.append("a secret did not reach the container")
        job = folder / command[command.index("--work") + 1]
        self.containers.append(ReplayContainer(self, job, environment))
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
            self.runpod.advance()
            for container in list(self.containers):
                if container.code is None:
                    container.act()
                else:
                    self.containers.remove(container)
            self.look()

    def look(self) -> None:
        """What must hold at every moment."""
        alive = self.alive()
        if len(alive) > 1:
            self.found.append(f"{len(alive)} Pods at once")
        self.look_at_the_adapter()
        self.look_at_the_stop(bool(alive))

    def look_at_the_adapter(self) -> None:
        if self.store.read(f"job-1/adapter/{MANIFEST}") is not None:
            try:
                verify_adapter(self.store.root / "job-1" / "adapter")
            except LorryError as error:
                self.found.append(f"a manifest before the adapter was whole: {error}")

    def look_at_the_stop(self, is_alive: bool) -> None:
        """Who stops a job ends its machine, whatever hangs there."""
        stopped = is_alive and self.store.read("job-1/stop.json") is not None
        self.stopped_ticks = self.stopped_ticks + 1 if stopped else 0
        if self.stopped_ticks > STOPPED_TICKS:
            self.found.append("a machine lives on although its job was stopped")

    def launcher(self) -> Backend:
        """A launcher's process; it may be one of those that die."""
        environment = {
            "RUNPOD_API_KEY": KEY, "RUNPOD_API_BASE_URL": self.runpod.url, "LORRY_IMAGE": IMAGE,
            "LORRY_POD_SECRETS": "HF_TOKEN=hf",
        }  # fmt: skip
        return Mortal(environment, self.deaths.pop(0) if self.deaths else "never", self)

    def live(self) -> str:
        """From the first launch to the last cent; returns how the job ended."""
        data = data_in(self.folder / "data")
        ended = "stuck"
        for _ in range(40):
            try:
                backend = self.launcher()
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

    def watch(self, backend: Backend) -> JobState:
        def sleep(seconds: float) -> None:
            self.pass_time(seconds)
            if self.stopped_ticks > STOPPED_TICKS or self.clock.now() > EPOCH + LONGEST_SECONDS:
                raise Endless
            due = self.script.user_stops_at
            if due is not None and self.clock.now() > EPOCH + due:
                stop_job(self.store, "job-1", backend, "user", "enough", self.clock.now())

        return watch(self.store, "job-1", backend, io.StringIO(), poll_seconds=30.0, now=self.clock.now, sleep=sleep)

    def settle(self, ended: str) -> None:
        """What must hold at the end, when the reaper too has been by, once and when all time is up."""
        backend = self.calm()
        self.pass_time(120.0)
        for seconds in (ENDED_SECONDS, self.script.deadline_seconds):
            if backend.owned():
                self.pass_time(seconds)
                send_the_reaper(backend, self.store, self.store.url, self.clock.now())
                self.pass_time(TICK_SECONDS)
        if self.machines_left():
            self.found.append("a machine is left")
        files = read_job(self.store, "job-1")
        if ended not in ("completed", "failed", "cancelled", "refused"):
            self.found.append(f"it ended as {ended}")
        if ended == "cancelled" and self.script.user_stops_at is None:
            self.found.append("cancelled although nobody did")
        if files.container is not None and files.container.ended == "failed" and not files.container.cause:
            self.found.append("failed without a cause")
        if (ended == "completed") != (files.manifest is not None):
            self.found.append(f"{ended}, and the manifest is {'there' if files.manifest else 'not there'}")
        if job_state(files, None, self.clock.now()).state in ("completed", "failed") and self.broke_ledger():
            self.found.append("the ledger is not the bill")
        self.found += [f"a secret in {where}" for where in self.leaks()]

    def calm(self) -> Backend:
        """The provider without faults, and a backend for it."""
        self.runpod.faults.clear()
        return RunpodPodBackend({"RUNPOD_API_KEY": KEY, "RUNPOD_API_BASE_URL": self.runpod.url})

    def alive(self) -> list[str]:
        """Pods that cost; one that has exited is for a person to look at, and the reaper leaves it."""
        pods = self.runpod.account.held["pods"].values()
        return [pod["id"] for pod in pods if pod["life"][0] in ("PROVISIONING", "STARTING", "RUNNING")]

    def machines_left(self) -> bool:
        return bool(self.alive())

    def broke_ledger(self) -> bool:
        """Whether the Pods that the job knows of do not make up the whole bill."""
        meter, now = self.runpod.account.meter, self.clock.now()
        known = PodClaims(self.store, "job-1", self.clock.now).pods()
        whole = sum(meter.total(pod_id, now) for pod_id in meter.spans)
        return abs(whole - sum(meter.total(pod_id, now) for pod_id in known)) > 1e-9

    def leaks(self) -> list[str]:
        secrets = (CANARY.encode(), KEY.encode())
        seen = [(f"{method} {path}", (path + body).encode()) for method, path, body in self.runpod.log]
        seen += [(str(p), p.read_bytes()) for p in self.store.root.rglob("*") if p.is_file()]
        seen.append(("the log of a Pod", repr(self.runpod.account.said).encode()))
        return [where for where, data in seen if any(secret in data for secret in secrets)]


def send_the_reaper(backend: Backend, store: Store, url: str, now: float) -> None:
    """What `lorry reap --yes` does where there is one store, at that URL."""
    machines = look({backend.name: backend}, lambda _: store, lambda seen: seen == url)
    reap(judge(Seen(tuple(machines)), now), {backend.name: backend}, lambda _: store, now)


class Mortal(RunpodPodBackend):
    """The backend of a launcher that is killed before or after its create."""

    def __init__(self, environment: Mapping[str, str], moment: str, world: World) -> None:
        super().__init__(environment, now=world.clock.now, sleep=world.pass_time)
        self.moment = moment

    def _create(self, *given: Any) -> Any:
        if self.moment == "before":
            raise Killed
        pod = super()._create(*given)
        if self.moment == "after":
            raise Killed
        return pod
