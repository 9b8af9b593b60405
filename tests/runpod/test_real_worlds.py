"""Nine jobs that train for real while something goes wrong: a verified adapter or a cause, and all of it billed."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from recipes.job import LaunchSpec, Stage
from recipes.load import load_recipe
from scripts.adapter import verify_adapter
from scripts.backends.runpod_api import RunpodApi
from scripts.container.supervisor import MARK
from scripts.errors import ProviderError
from scripts.fake_runpod.host import Host, Mishap
from scripts.fake_runpod.processes import ProcessRunner
from scripts.fake_runpod.server import serve
from scripts.job_lock import lock_owner
from scripts.models import making_commands, recipe_folder
from scripts.state import JobState
from scripts.stop import stop_job
from scripts.store import open_store
from scripts.watch import watch
from tests.runpod.conftest import IMAGE, KEY, REPOSITORY, Room
from tests.runpod.test_real_trainer import smoke_spec
from tests.runpod.world import random_fault

AT_ONCE = 2
LAUNCHES = 20
BLOWS: tuple[tuple[str, Stage], ...] = (
    ("nothing", "training"),
    ("kill the container", "loading"),
    ("kill the container", "training"),
    ("kill the container", "proving"),
    ("kill the trainer", "training"),
    ("lose the machine", "training"),
    ("lose the machine", "proving"),
    ("let no Pod end itself", "loading"),
    ("stop the job", "training"),
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The smoke model, made once."""
    recipe = load_recipe("smoke/zero3").recipe
    for command in making_commands(tmp_path, recipe):
        subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, timeout=280)
    return recipe_folder(tmp_path, recipe)


@dataclass
class RealWorld:
    """One job whose Pods run the real container. `seed` draws how Runpod fails; the blow falls once, in its stage."""

    seed: int
    room: Room
    host: Host
    found: list[str] = field(default_factory=list)
    struck: int = 0

    def live(self) -> JobState:
        """From the first launch to the end, launched again whenever its machine was lost."""
        over = threading.Event()
        striker = threading.Thread(target=self.wait_and_strike, args=(over,), daemon=True)
        striker.start()
        try:
            for _ in range(LAUNCHES):
                try:
                    self.room.launch()
                    state = watch(self.room.store, self.room.spec.job_id, self.room.backend, io.StringIO())
                except ProviderError:
                    time.sleep(1)
                    continue
                if state.state != "lost":
                    return state
            raise AssertionError(f"launched {LAUNCHES} times\n{self.room.said()}")
        finally:
            over.set()
            striker.join()

    def wait_and_strike(self, over: threading.Event) -> None:
        what, stage = BLOWS[self.seed]
        while not over.wait(0.02):
            if stage in self.stages():
                self.strike(what)
                self.struck += 1
                return

    def stages(self) -> set[str]:
        """Where the container and its trainer are by now, from their own files: a bucket hears of it later."""
        found = set()
        for path in self.host.folder.glob("*/jobs/*/*.json"):
            if path.name in ("container.json", "status.json"):
                try:
                    found.add(json.loads(path.read_bytes())["stage"])
                except (OSError, ValueError):
                    continue
        return found

    def strike(self, what: str) -> None:
        pod = next(iter(self.host.machines))
        work = self.host.folder / pod / "jobs" / self.room.spec.job_id
        match what:
            case "kill the container":
                owner = lock_owner(work)
                assert owner is not None
                os.kill(owner.pid, signal.SIGKILL)
            case "kill the trainer":
                for pid in trainers_of(work):
                    os.kill(pid, signal.SIGKILL)
            case "lose the machine":
                with self.room.runpod.lock:
                    self.host.machines[pod].mishap = Mishap("vanish")
            case "let no Pod end itself":
                self.room.runpod.pod_keys_work = False
            case "stop the job":
                self.room.runpod.faults.clear()
                stop_job(self.room.store, self.room.spec.job_id, self.room.backend, "operator", "enough", time.time())

    def judge(self, state: JobState) -> None:
        """What must hold at the end, when whoever looks at overdue machines has been by."""
        self.room.runpod.faults.clear()
        if BLOWS[self.seed][0] == "let no Pod end itself":
            for owned in self.room.backend.owned():
                self.room.backend.stop(owned.handle)
        files = self.room.finish()
        if state.state == "completed":
            verify_adapter(Path(self.room.store.url.removeprefix("file://")) / files.job_id / "adapter")
        elif state.state != "failed" or not state.sentence:
            self.found.append(f"it ended as {state.state}: {state.sentence}")
        if (state.state == "completed") != (files.manifest is not None):
            self.found.append(f"{state.state}, and its manifest says otherwise")
        if files.container is not None and files.container.ended == "failed" and not files.container.cause:
            self.found.append("failed without a cause")
        meter, now, known = self.room.runpod.account.meter, time.time(), self.room.claims().pods()
        if set(meter.spans) - set(known):
            self.found.append("a Pod was billed that the ledger does not know")
        ledger, bill = sum(meter.total(pod, now) for pod in known), sum(self.room.billed().values())
        if not ledger or abs(ledger - bill) > 1e-4:
            self.found.append(f"the ledger says ${ledger:.6f}, the bill ${bill:.6f}")


def trainers_of(work: Path) -> list[int]:
    """The ranks of the trainer: not torchrun, whose command names the trainer too."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
            if b"trainer.train" in command and b"torch.distributed" not in command:
                marks = (entry / "environ").read_bytes().split(b"\0")
                found += [int(entry.name)] if f"{MARK}={work}".encode() in marks else []
        except OSError:
            continue
    return found


def lived(seed: int, spec: LaunchSpec, data: Path, model: Path, folder: Path) -> tuple[str, list[str]]:
    """How the job of this world ended, and every promise that was broken."""
    chance = random.Random(seed)
    host = Host(folder / "host", ProcessRunner())
    with serve(KEY, host=host) as runpod:
        with RunpodApi(KEY, runpod.url) as api:
            volume = api.create("network-volumes", {"name": "models", "size": 10, "dataCenter": "US-MO-1"})["id"]
        shutil.copytree(model, host.folder / "volumes" / volume / "models" / "lorry--smoke")
        runpod.faults += [random_fault(chance) for _ in range(chance.randint(1, 3))]
        store = open_store((folder / "store").as_uri())
        environment = {"RUNPOD_API_KEY": KEY, "RUNPOD_API_BASE_URL": runpod.url, "LORRY_IMAGE": IMAGE}
        environment |= {"RUNPOD_VOLUME_ID": volume}
        mine = spec.model_copy(update={"store": store.url, "job_id": f"real-{seed}"})
        world = RealWorld(seed, Room(runpod, store, data, environment, mine), host)
        state = world.live()
        world.judge(state)
        if not world.struck:
            world.found.append("the blow never fell")
        said = world.room.said() if world.found else ""
        return state.state, [f"world {seed}: {fault}\n{said}" for fault in world.found + runpod.drift]


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_nine_jobs_that_really_train_end_well_or_with_a_cause(tmp_path: Path, model: Path) -> None:
    spec = smoke_spec(tmp_path / "data", "real-0")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        worlds = [
            pool.submit(lived, seed, spec, tmp_path / "data", model, tmp_path / str(seed)) for seed in range(len(BLOWS))
        ]
        ends = [world.result() for world in worlds]
    assert [fault for _, faults in ends for fault in faults] == []
    states = [state for state, _ in ends]
    assert states == ["completed"] * 8 + ["failed"], states  # only the last one was told to stop
