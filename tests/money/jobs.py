"""Job folders at every stage of a life, made of real records."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from recipes.job import Attempt, ContainerState, LaunchSpec, Manifest, Record, Result, Stage, Status, Stop, Submission
from recipes.load import LoadedRecipe, load_recipe
from scripts.store import Store
from tests.container.replay_trainer import tensors

T0 = 1_790_000_000.0
"Some moment in September 2026."
HOUR = 3600.0
OFFER = "runpod-h100-pcie-1"
PRICE = 2.89


def spec_of(job_id: str, store: Store, **changes: Any) -> LaunchSpec:
    """What render would give for the smoke recipe on one H100, for an hour at most."""
    loaded = _smoke()
    values: dict[str, Any] = dict(
        job_id=job_id, recipe_name=loaded.name, recipe_sha256=loaded.sha256, recipe=loaded.recipe,
        backend="runpod_pod", offer=OFFER, model_type="qwen3_next", gpus=1, nodes=1, accumulation_steps=1,
        total_steps=40, steps_per_epoch=20, trainable_parameters=4, deadline_seconds=3600, quote_usd=1.5,
        cap_usd=PRICE, source="a test", source_sha256="", train_sha256="", valid_sha256="", train_examples=1,
        valid_examples=1, store=store.url,
    )  # fmt: skip
    return LaunchSpec(**(values | changes))


@functools.cache
def _smoke() -> LoadedRecipe:
    return load_recipe("smoke/zero3")


@dataclass
class Life:
    """What a job's container and trainer write in the course of a life."""

    store: Store
    job_id: str

    def submitted(self, at: float, **handle: Any) -> Life:
        """Recorded, and asked of the provider where a handle is given; nothing was rented here."""
        spec = spec_of(self.job_id, self.store)
        self._write("launch.json", spec)
        request = Submission(
            job_id=self.job_id, backend=spec.backend, request_sha256="", submitted_at=at, handle=handle
        )
        self._write("submission.json", request)
        return self

    def runs(self, at: float, *, since: float | None = None, stage: Stage = "training", step: int = 10) -> Life:
        """The container's and the trainer's last words at that moment."""
        began = at if since is None else since
        attempts = (Attempt(number=1, started_at=began),)
        self._write("container.json", self._container(stage=stage, updated_at=at, started_at=began, attempts=attempts))
        status = Status(
            job_id=self.job_id, stage=stage, attempt=1, updated_at=at, epoch=step // 20, step=step, total_steps=40,
            progress=step * 100 // 40, training_loss=2.5, learning_rate=1e-4, tokens_per_second=900.0,
        )  # fmt: skip
        self._write("status.json", status)
        return self

    def completed(self, at: float, since: float) -> Life:
        """The adapter is whole, the manifest last."""
        files = {"adapter_config.json": b"{}", "adapter_model.safetensors": tensors(1)}
        hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        for name, data in files.items():
            self.store.write(f"{self.job_id}/adapter/{name}", data)
        result = Result(
            job_id=self.job_id, outcome="completed", exit_code=0, attempt=1, step=40, total_steps=40,
            final_training_loss=1.25, wall_seconds=at - since + 0.7, adapter_sha256=hashes, ended_at=at,
        )  # fmt: skip
        self._write("result.json", result)
        self._ended("completed", "", at, since)
        manifest = Manifest(
            job_id=self.job_id, created_at=at, files=hashes, base_model="lorry/smoke", base_revision=None,
            base_sha256="", recipe_name="smoke/zero3", recipe_sha256="", training_set_sha256="", train_sha256="",
            valid_sha256="", versions={}, commit=None, image=None, initial_validation_loss=5.0,
            final_validation_loss=4.0, effect=0.5, reproduction_error=0.0, trainable_parameters=4,
            wall_seconds=at - since, cost_usd=None,
        )  # fmt: skip
        self._write("adapter/manifest.json", manifest)
        return self

    def failed(
        self, at: float, since: float, sentence: str = "a GPU ran out of memory", said_at: float | None = None
    ) -> Life:
        """said_at: the last word of a container that says it again and again."""
        return self._ended("failed", sentence, at, since, said_at)

    def stopped(self, at: float, by: str = "user") -> Life:
        self._write("stop.json", Stop.model_validate({"by": by, "reason": "a test", "at": at}))
        return self

    def record(self, name: str) -> dict[str, Any] | None:
        data = self.store.read(f"{self.job_id}/{name}")
        value: dict[str, Any] | None = json.loads(data) if data else None
        return value

    def _ended(self, how: str, sentence: str, at: float, since: float, said_at: float | None = None) -> Life:
        attempts = (Attempt(number=1, started_at=since, ended_at=at, exit_code=0 if how == "completed" else 20),)
        cause = None if how == "completed" else "out_of_memory"
        ended = {"ended": how, "cause": cause, "sentence": sentence}
        times = {"updated_at": said_at or at, "started_at": since, "attempts": attempts}
        self._write("container.json", self._container(stage="done", **times, **ended))
        return self

    def _container(self, **values: Any) -> ContainerState:
        return ContainerState(job_id=self.job_id, pid=1, **values)

    def _write(self, name: str, record: Record) -> None:
        self.store.write(f"{self.job_id}/{name}", record.model_dump_json().encode())
