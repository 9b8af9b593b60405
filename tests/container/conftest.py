"""Jobs that run the real container with a replay trainer, through the real local backend, on a store in a folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from recipes.job import LaunchSpec, Submission
from recipes.load import load_recipe
from scripts.backends.local import LocalBackend
from scripts.container.supervisor import MARK
from scripts.job_folder import JobFiles, read_job
from scripts.job_lock import lock_owner
from scripts.launch import launch
from scripts.store import Store, open_store

REPOSITORY = Path(__file__).resolve().parents[2]
MODULE = "tests.container.replay_container"
PATIENT = {"grace": 5.0, "no_progress": 20.0}
LIMIT_SECONDS = 200.0


@dataclass
class Job:
    """One job in a store, and the hands to start, hit and look at it."""

    store: Store
    folder: Path
    "Where its container works."
    environment: dict[str, str]
    spec: LaunchSpec
    data: Path
    module: str = MODULE
    submissions: list[Submission] = field(default_factory=list)

    @property
    def backend(self) -> LocalBackend:
        return LocalBackend(self.environment, self.module)

    def launch(self) -> Submission:
        self.submissions.append(launch(self.store, self.spec, None, self.data, self.backend, time.time()))
        return self.submissions[-1]

    def files(self) -> JobFiles:
        return read_job(self.store, self.spec.job_id)

    def is_gone(self) -> bool:
        return self.backend.observe(self.submissions[-1].handle).phase == "gone"

    def wait(self, for_what: Callable[[], Any], seconds: float = LIMIT_SECONDS) -> None:
        """Until it is so, looking every 20 ms."""
        give_up = time.monotonic() + seconds
        while not for_what():
            assert time.monotonic() < give_up, f"never came: {self.files().container}\n{self.log()}"
            time.sleep(0.02)

    def finish(self) -> JobFiles:
        """The files when its container is gone."""
        self.wait(self.is_gone)
        return self.files()

    def reach(self, step: int) -> None:
        """Until the trainer has finished that step."""
        self.wait(lambda: (status := self.files().status) and status.step >= step)

    def kill_container(self) -> None:
        """kill -9 of the container alone, if one runs."""
        owner = lock_owner(self.folder)
        if owner:
            os.kill(owner.pid, signal.SIGKILL)

    def processes(self) -> list[int]:
        """Every process that carries this job's mark."""
        needle, found = f"{MARK}={self.folder}".encode(), []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if needle in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
                except OSError:
                    continue
        return found

    def log(self) -> str:
        path = self.folder / "logs" / "container.log"
        return path.read_text() if path.exists() else "no container.log"

    def starts(self) -> int:
        """How many containers took this job."""
        return self.log().count("takes the job")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder in which the smoke model looks complete, so that nothing has to be made."""
    from tests.container.replay_trainer import tensors

    folder = tmp_path_factory.mktemp("models") / "lorry--smoke"
    shutil.copytree(REPOSITORY / "recipes" / "smoke" / "model", folder)
    (folder / "model.safetensors").write_bytes(tensors(0))
    return folder.parent


@pytest.fixture
def make_job(tmp_path: Path, models: Path) -> Callable[..., Job]:
    """make_job("name", deadline_seconds=600, store=None, folder=None, **replay): a job, not launched yet."""

    def make(
        name: str = "job-1",
        deadline_seconds: int = 600,
        store: Store | None = None,
        folder: Path | None = None,
        **replay: Any,
    ) -> Job:
        store = store or open_store((tmp_path / "store").as_uri())
        data = tmp_path / "data"
        data.mkdir(exist_ok=True)
        for part in ("train.jsonl", "valid.jsonl", "report.json"):
            (data / part).write_text("{}\n")
        script = {"steps": 8, "step_seconds": 0.02, "checkpoint_steps": 3, "timing": PATIENT} | replay
        store.write(f"{name}/replay.json", json.dumps(script).encode())
        environment = {**os.environ, "LORRY_MODELS": str(models), "HOME": str(tmp_path)}
        spec = spec_of(name, store.url, deadline_seconds, int(script["steps"]))
        return Job(store, folder or tmp_path / "store" / name, environment, spec, data)

    return make


def spec_of(job_id: str, store: str, deadline_seconds: int, steps: int) -> LaunchSpec:
    """What render would give for the smoke recipe."""
    loaded = load_recipe("smoke/zero3")
    sha = hashlib.sha256(b"{}\n").hexdigest()
    return LaunchSpec(
        job_id=job_id, recipe_name=loaded.name, recipe_sha256=loaded.sha256, recipe=loaded.recipe, backend="local",
        offer="local-2", model_type="qwen3_next", gpus=2, nodes=1, accumulation_steps=1, total_steps=steps,
        steps_per_epoch=steps, trainable_parameters=4, deadline_seconds=deadline_seconds, quote_usd=0.0, cap_usd=0.0,
        source="a test", source_sha256=sha, train_sha256=sha, valid_sha256=sha, train_examples=1, valid_examples=1,
        store=store,
    )  # fmt: skip
