"""A local Runpod whose Pods run the real container with the replay trainer, on a store in a folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from recipes.job import LaunchSpec, Submission
from recipes.load import load_recipe
from recipes.recipe import Recipe
from scripts.backends.runpod_api import RunpodApi
from scripts.backends.runpod_pod import RunpodPodBackend
from scripts.backends.runpod_pod_claims import PodClaims
from scripts.fake_runpod.host import Host
from scripts.fake_runpod.processes import ProcessRunner
from scripts.fake_runpod.server import LocalRunpod, serve
from scripts.job_folder import JobFiles, read_job
from scripts.launch import launch
from scripts.store import Store, open_store

REPOSITORY = Path(__file__).resolve().parents[2]
OPENAPI = Path(os.environ["RUNPOD_OPENAPI"]) if "RUNPOD_OPENAPI" in os.environ else None
KEY = "rpa_CANARY_control_plane_key"
IMAGE = "registry.example/lorry/trainer@sha256:" + "a" * 64
OFFER = "runpod-a100-pcie-1"
LIMIT_SECONDS = 200.0


def spec_of(job_id: str, store: str, *, deadline_seconds: int = 3600, steps: int = 8, **changes: Any) -> LaunchSpec:
    """What render would give for the smoke recipe on a Pod with one A100."""
    smoke = load_recipe("smoke/zero3")
    values = smoke.recipe.model_dump()
    values["hardware"] |= {"backends": ("runpod_pod",), "gpus": 1}
    sha = hashlib.sha256(b"{}\n").hexdigest()
    spec = LaunchSpec(
        job_id=job_id, recipe_name=smoke.name, recipe_sha256=smoke.sha256, recipe=Recipe.model_validate(values),
        backend="runpod_pod", offer=OFFER, model_type="qwen3_next", gpus=1, nodes=1, accumulation_steps=1,
        total_steps=steps, steps_per_epoch=steps, trainable_parameters=4, deadline_seconds=deadline_seconds,
        quote_usd=0.5, cap_usd=2.0, source="a test", source_sha256=sha, train_sha256=sha, valid_sha256=sha,
        train_examples=1, valid_examples=1, store=store,
    )  # fmt: skip
    return spec.model_copy(update=changes)


def data_in(folder: Path) -> Path:
    """The smallest training set that can be launched."""
    folder.mkdir(exist_ok=True)
    for part in ("train.jsonl", "valid.jsonl", "report.json"):
        (folder / part).write_text("{}\n")
    return folder


@dataclass
class Room:
    """One account of the local Runpod, a store, and one job in it."""

    runpod: LocalRunpod
    store: Store
    data: Path
    environment: dict[str, str]
    spec: LaunchSpec
    submissions: list[Submission] = field(default_factory=list)

    @property
    def backend(self) -> RunpodPodBackend:
        return RunpodPodBackend(self.environment)

    def launch(self, **clock: Any) -> Submission:
        backend = RunpodPodBackend(self.environment, **clock)
        self.submissions.append(launch(self.store, self.spec, None, self.data, backend, time.time()))
        return self.submissions[-1]

    def files(self) -> JobFiles:
        return read_job(self.store, self.spec.job_id)

    def wait(self, for_what: Callable[[], Any], seconds: float = LIMIT_SECONDS) -> None:
        """Until it is so, looking every 50 ms."""
        give_up = time.monotonic() + seconds
        while not for_what():
            assert time.monotonic() < give_up, f"never came: {self.files().container}\n{self.said()}"
            time.sleep(0.05)

    def finish(self) -> JobFiles:
        """The files when no Pod is left."""
        self.wait(lambda: not self.pods())
        return self.files()

    def pods(self) -> list[dict[str, Any]]:
        with self.runpod.lock:
            return list(self.runpod.account.held["pods"].values())

    def said(self) -> str:
        with self.runpod.lock:
            return "\n".join(f"{i}: {line['line']}" for i, lines in self.runpod.account.said.items() for line in lines)

    def creates(self) -> int:
        """How many requests for a Pod went over the wire."""
        return sum(entry[:2] == ("POST", "/v2/pods") for entry in self.runpod.log)

    def claims(self) -> PodClaims:
        return PodClaims(self.store, self.spec.job_id, time.time)

    def billed(self) -> dict[str, float]:
        """USD by Pod, as the API says it."""
        with RunpodApi(KEY, self.runpod.url) as api:
            records = api.ask("GET", "/billing/pods", query={"bucketSize": "hour"})["records"]
        return {r["podId"]: sum(s["totalAmount"] for s in records if s["podId"] == r["podId"]) for r in records}


@pytest.fixture
def runpod(tmp_path: Path) -> Iterator[LocalRunpod]:
    """A local Runpod whose containers are the real one with the replay trainer; its answers keep to the contract."""
    host = Host(tmp_path / "host", ProcessRunner({"scripts.container": "tests.runpod.replay_pod"}))
    with serve(KEY, OPENAPI, host=host) as local:
        yield local
        assert local.drift == []


@pytest.fixture
def make_room(runpod: LocalRunpod, tmp_path: Path) -> Callable[..., Room]:
    """make_room("job-1", deadline_seconds=600, **replay): a job, not launched, and a volume with the base model."""
    from tests.container.replay_trainer import tensors

    with RunpodApi(KEY, runpod.url) as api:
        volume = api.create("network-volumes", {"name": "models", "size": 10, "dataCenter": "US-MO-1"})["id"]
    models = runpod.host.folder / "volumes" / volume / "models" / "lorry--smoke"  # type: ignore[union-attr]
    shutil.copytree(REPOSITORY / "recipes" / "smoke" / "model", models)
    (models / "model.safetensors").write_bytes(tensors(0))

    def make(job_id: str = "job-1", deadline_seconds: int = 3600, **replay: Any) -> Room:
        store = open_store((tmp_path / "store").as_uri())
        script = {"steps": 8, "step_seconds": 0.02, "checkpoint_steps": 3} | replay
        script["timing"] = {"grace": 5.0, "no_progress": 20.0} | script.get("timing", {})
        store.write(f"{job_id}/replay.json", json.dumps(script).encode())
        environment = {
            "RUNPOD_API_KEY": KEY,
            "RUNPOD_API_BASE_URL": runpod.url,
            "RUNPOD_VOLUME_ID": volume,
            "LORRY_IMAGE": IMAGE,
        }
        spec = spec_of(job_id, store.url, deadline_seconds=deadline_seconds, steps=int(script["steps"]))
        return Room(runpod, store, data_in(tmp_path / "data"), environment, spec)

    return make
