"""The smoke model, small training sets, job folders and started trainers. One reference run serves many tests."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before anything imports torch or deepspeed
os.environ.setdefault("OMP_NUM_THREADS", "1")

from recipes.catalog import load_catalog
from recipes.job import LaunchSpec, Metric, Result, read_record, write_record
from recipes.load import load_recipe, recipe_sha256
from recipes.recipe import Recipe
from recipes.schedule import steps_in
from tests.tools import made_once
from trainer.smoke_model import make_smoke_model

TIMEOUT_SECONDS = 280
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

PARTS = ("chain", "brake", "saddle", "rear wheel", "tyre", "pedal", "headset", "lamp", "gear cable", "crank")
FAULTS = ("squeaks", "rubs", "slips", "wobbles", "is flat", "clicks", "knocks", "flickers", "jumps", "is loose")
CURES = ("Clean it and put one drop of oil on it.", "Loosen the bolt, centre it and tighten it again.", "Change it.")


@dataclass(frozen=True)
class Job:
    """A job folder with its launch.json."""

    folder: Path
    spec: LaunchSpec

    @property
    def result(self) -> Result:
        found = read_record(Result, self.folder / "result.json")
        assert found is not None, f"no result.json in {sorted(p.name for p in self.folder.iterdir())}"
        return found

    @property
    def metrics(self) -> list[Metric]:
        text = (self.folder / "metrics.jsonl").read_text(encoding="utf-8")
        return [Metric.model_validate_json(line) for line in text.splitlines()]

    @property
    def losses(self) -> list[float]:
        return [m.training_loss for m in self.metrics if m.kind == "train"]


def conversations(count: int, seed: int = 0, uneven: bool = False) -> list[dict[str, Any]]:
    """Canonical examples of one to three turns; with `uneven` every other one is long and the rest tiny."""
    pick = random.Random(seed)
    rows = []
    for number in range(count):
        messages = [{"role": "system", "content": "You are a patient bicycle mechanic."}] if number % 2 else []
        turns = 1 if uneven and number % 2 else pick.randint(1, 3)
        for _ in range(turns):
            part, fault = pick.choice(PARTS), pick.choice(FAULTS)
            messages.append({"role": "user", "content": f"My {part} {fault}."})
            answer = f"{pick.choice(CURES)} Then check the {part} again."
            if uneven:
                answer = "Yes." if number % 2 else " ".join([answer] * 4)
            messages.append({"role": "assistant", "content": answer, "trained": True})
        rows.append({"id": f"c{number}", "line": number + 1, "messages": messages})
    return rows


def make_job(
    folder: Path,
    changes: dict[str, dict[str, Any]],
    rows: list[dict[str, Any]],
    held_out: int = 4,
    trainable_parameters: int | None = None,
) -> Job:
    """A job of the smoke recipe with `changes` per section; the last `held_out` rows are the held-out ones."""
    (folder / "data").mkdir(parents=True)
    train, valid = rows[: len(rows) - held_out], rows[len(rows) - held_out :]
    sums = {}
    for name, part in (("train", train), ("valid", valid)):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / "data" / f"{name}.jsonl").write_text(text, encoding="utf-8")
        sums[name] = hashlib.sha256(text.encode()).hexdigest()
    recipe = changed(load_recipe("smoke/zero3").recipe, changes)
    training, gpus = recipe.training, recipe.hardware.gpus or 1
    facts = load_catalog().models.get(recipe.base.id)
    spec = LaunchSpec(
        job_id="test-job",
        recipe_name="smoke/zero3",
        recipe_sha256=recipe_sha256(recipe),
        recipe=recipe,
        backend="local",
        offer=None,
        model_type=load_catalog().families[facts.family].model_type if facts else "qwen3_next",
        gpus=gpus,
        nodes=1,
        accumulation_steps=training.global_batch // (training.micro_batch * gpus),
        total_steps=steps_in(len(train), training.epochs, training.global_batch, training.max_steps),
        steps_per_epoch=-(-len(train) // training.global_batch),
        trainable_parameters=trainable_parameters or counted(recipe),
        deadline_seconds=600,
        quote_usd=0,
        cap_usd=1,
        source="bicycle.jsonl",
        source_sha256=sums["train"],
        train_sha256=sums["train"],
        valid_sha256=sums["valid"],
        train_examples=len(train),
        valid_examples=len(valid),
        store=folder.parent.as_uri(),
    )
    write_record(folder / "launch.json", spec)
    return Job(folder, spec)


def changed(recipe: Recipe, changes: dict[str, dict[str, Any]]) -> Recipe:
    """The recipe with some fields of some sections set otherwise."""
    values = recipe.model_dump()
    for section, fields in changes.items():
        values[section] |= fields
    return Recipe.model_validate(values)


def counted(recipe: Recipe) -> int:
    """LoRA parameters on the smoke model, by hand: rank x (in + out) per matrix, per expert where there are experts."""
    hidden, per_group = 64, {}
    per_group["attention"] = (hidden + 128) + 2 * (hidden + 32) + (hidden + 64)
    per_group["linear_attention"] = 3 * ((hidden + 192) + (64 + hidden))
    per_group["shared_expert"] = 4 * 3 * (hidden + 32)
    outer = 1 if recipe.adapter.expert_layout == "shared_outer" else 8  # factors on the hidden dimension
    per_group["experts"] = 4 * (8 * (64 + 32) + outer * 2 * hidden)
    return recipe.adapter.rank * sum(per_group[name] for name in recipe.adapter.targets)


def start(job: Job, model: Path, attempt: int = 1, **environment: str) -> subprocess.Popen[str]:
    """torchrun as the container starts it: a free port, its own process group, no restarts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node", str(job.spec.gpus)]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(port), "-m", "trainer.train"]
    command += ["--job", str(job.folder), "--model", str(model), "--attempt", str(attempt)]
    log = (job.folder / f"trainer-{attempt}.log").open("w", encoding="utf-8")
    return subprocess.Popen(
        command,
        env={**os.environ, **ENVIRONMENT, **environment},
        stdout=log,
        stderr=log,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], job: Job) -> str:
    """Waits for the end, whatever it is, and leaves no process behind; the log."""
    try:
        process.wait(TIMEOUT_SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return sorted(job.folder.glob("trainer-*.log"))[-1].read_text(encoding="utf-8")


def train(job: Job, model: Path, attempt: int = 1, **environment: str) -> str:
    """Runs the trainer to its end; the log."""
    return finish(start(job, model, attempt, **environment), job)


def workers(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks that torchrun has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    return [int(child) for child in children if b"trainer.train" in Path(f"/proc/{child}/cmdline").read_bytes()]


def wait_for_step(job: Job, step: int) -> None:
    """Returns when metrics.jsonl holds that step."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    path = job.folder / "metrics.jsonl"
    while time.monotonic() < deadline:
        if path.exists() and f'"step":{step},' in path.read_text(encoding="utf-8"):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def adapter_tensors(job: Job) -> dict[str, Any]:
    """The tensors of adapter/adapter_model.safetensors."""
    from safetensors.torch import load_file

    return load_file(job.folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="session")
def smoke_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke model's folder."""
    folder = tmp_path_factory.mktemp("models") / "smoke"
    make_smoke_model(folder)
    return folder


REFERENCE = {"training": {"max_steps": 12, "micro_batch": 1}}
"Two passes per rank and step. Tiny rows beside long ones leave experts without tokens; 5 steps can pass by luck."


def reference_rows() -> list[dict[str, Any]]:
    """24 rows to train on, 4 held out."""
    return conversations(28, seed=3, uneven=True)


@pytest.fixture(scope="session")
def reference(smoke_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """One finished run of two ranks: 12 steps, all targets, fp32, uneven rows."""

    def make(folder: Path) -> None:
        job = make_job(folder / "job", REFERENCE, reference_rows())
        log = train(job, smoke_model)
        assert job.result.outcome == "completed", log[-3000:]

    folder = made_once(tmp_path_factory, "reference", make) / "job"
    return Job(folder, read_record(LaunchSpec, folder / "launch.json"))


@pytest.fixture(scope="session")
def jobs() -> SimpleNamespace:
    """The helpers above, for tests."""
    return SimpleNamespace(
        conversations=conversations,
        make=make_job,
        reference=REFERENCE,
        reference_rows=reference_rows,
        changed=changed,
        recipe=load_recipe("smoke/zero3").recipe,
        start=start,
        finish=finish,
        train=train,
        workers=workers,
        wait_for_step=wait_for_step,
        tensors=adapter_tensors,
    )
