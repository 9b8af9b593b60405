"""Finished jobs of the smoke model for the tests of evaluation and serving, made in one process in a few seconds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from unittest.mock import patch

import pytest

from recipes.catalog import load_catalog
from recipes.job import LaunchSpec, Result, write_record
from recipes.preparation import Plan, TokenCounts, TrainingSetReport
from tests.tools import made_once
from tests.trainer.conftest import conversations, make_job
from trainer.smoke_model import make_smoke_model

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12


@dataclass(frozen=True)
class Desk:
    """A store on disk with jobs in it, the models folder, and a terminal."""

    store: Path
    models: Path

    def lorry(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        seen = {"PATH": os.environ["PATH"], "HOME": str(self.models.parent), "PYTHONPATH": str(ROOT)}
        seen |= {"LORRY_STORE": self.store.as_uri(), "LORRY_MODELS": str(self.models), "LOGNAME": "tester"}
        return subprocess.run(
            [sys.executable, "-m", "scripts.cli", *words],
            cwd=self.models.parent,
            env=seen | environment,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )

    def job(self, name: str) -> Path:
        return self.store / name


def train_by_hand(job: Any, model_folder: Path, rate: float) -> None:
    """What the trainer leaves behind, by plain AdamW in this process: adapter, probe, result, proof, manifest."""
    import torch
    from transformers import AutoModelForCausalLM

    from scripts.adapter import write_manifest
    from trainer import probe, targets
    from trainer.base_files import BaseFiles, loading
    from trainer.batches import padded
    from trainer.data import ChatTokens, read_examples
    from trainer.evaluate import measure
    from trainer.export import write_adapter
    from trainer.prove import prove

    spec: LaunchSpec = job.spec
    family = load_catalog().family_of(spec.recipe.base.id)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, **loading(family))[0]
    plan = targets.plan_targets(base, family, spec.recipe.adapter)
    targets.attach(base, family, spec.recipe.adapter, plan, seed=1, dtype=torch.float32)
    chat = ChatTokens(model_folder)
    data = job.folder / "data"
    train = read_examples(data / "train.jsonl", spec.train_sha256, spec.train_examples, chat, 1024)
    valid = read_examples(data / "valid.jsonl", spec.valid_sha256, spec.valid_examples, chat, 1024)
    optimizer = torch.optim.AdamW([p for p in base.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    for step in range(STEPS):
        rows = padded([train[(step * 4 + i) % len(train)] for i in range(4)], chat.pad_id, "cpu")
        base(**rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    base.eval()
    chosen = probe.choose(train, valid)
    trained = probe.log_probabilities(base, chosen, "cpu")
    with targets.base_only(base):
        before = probe.log_probabilities(base, chosen, "cpu")
    probe.write_probe(job.folder / "probe.safetensors", chosen, before, trained)
    weights = {name: p.detach() for name, p in base.named_parameters() if p.requires_grad}
    config = targets.lora_config(family, spec.recipe.adapter)
    sums = write_adapter(job.folder / "adapter", config, spec.recipe.base, weights, plan)
    result = Result(
        job_id=spec.job_id,
        outcome="completed",
        exit_code=0,
        attempt=1,
        step=STEPS,
        total_steps=STEPS,
        trainable_parameters=plan.parameters,
        adapter_sha256=sums,
        base_sha256=BaseFiles(model_folder).sha256(),
    )
    write_record(job.folder / "result.json", result)
    proven = prove(job.folder, model_folder)
    write_record(job.folder / "proof.json", proven.proof)
    with patch.multiple("trainer.evaluate", ANSWER_TOKENS=8, MOST_ANSWERS=2):
        scores = measure(proven.model, job.folder, model_folder, spec, result)
    write_record(job.folder / "scores.json", scores)
    write_manifest(job.folder, spec, result, proven.proof, cost_usd=0.0, now=1_700_000_000.0)


def finished_job(folder: Path, models: Path, job_id: str, rate: float = 0.01, seed: int = 3, **changes: Any) -> Path:
    """A finished job named like its folder."""
    job = make_job(folder / job_id, changes, conversations(20, seed=seed))
    spec = job.spec.model_copy(update={"job_id": job_id, "store": folder.as_uri()})
    write_record(job.folder / "launch.json", spec)
    _write_preparation(job.folder, spec)
    train_by_hand(type(job)(job.folder, spec), models / "lorry--smoke", rate)
    return job.folder


def renamed(store: Path, job_id: str, new_id: str) -> Path:
    """The same adapter as the work of another job."""
    folder = Path(shutil.copytree(store / job_id, store / new_id))
    for name in ("launch.json", "result.json", "proof.json", "scores.json", "adapter/manifest.json"):
        value = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(value | {"job_id": new_id}))
    return folder


def _write_preparation(folder: Path, spec: LaunchSpec) -> None:
    tokens = TokenCounts(exact=True, tokenizer="smoke", train=9, valid=9, trained=9, longest=9, longest_id="c1")
    report = TrainingSetReport(
        source="bicycle.jsonl", source_sha256="0" * 64, source_bytes=1, form="pairs", rows=20, usable_rows=20,
        skipped=(), conversations=20, merged=0, per_pair=0, duplicates=0, train_examples=16, valid_examples=4,
        train_sha256="0" * 64, valid_sha256="0" * 64, tokens=tokens,
    )  # fmt: skip
    plan = Plan(
        recipe=spec.recipe_name, recipe_sha256=spec.recipe_sha256, model=spec.recipe.base.id, trainable_parameters=1,
        examples=16, train_tokens=9, longest_tokens=9, tokens_exact=True, steps=STEPS, steps_per_epoch=4, offers=(),
        chosen="local-2", prices_of="2026-11-22",
    )  # fmt: skip
    write_record(folder / "data" / "report.json", report)
    write_record(folder / "plan.json", plan)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """One job, `good-1`, whose adapter learned. Nobody changes it; tests take a `desk`."""

    def make(home: Path) -> None:
        make_smoke_model(home / "models" / "lorry--smoke")
        (home / "jobs").mkdir()
        finished_job(home / "jobs", home / "models", "good-1")

    home = made_once(tmp_path_factory, "made", make)
    return Desk(home / "jobs", home / "models")


@pytest.fixture
def desk(made: Desk, tmp_path: Path) -> Desk:
    """A copy of the made jobs, free to be changed."""
    return Desk(Path(shutil.copytree(made.store, tmp_path / "jobs")), made.models)


@dataclass
class Told:
    """What a small HTTP server was asked."""

    url: str
    requests: list[tuple[str, dict[str, str], Any]]


@pytest.fixture
def http_server() -> Iterator[Callable[[Callable[[Any], tuple[int, Any]]], Told]]:
    """serve(answer): a real server whose POST replies are answer(body) -> (status, JSON)."""
    servers = []

    def serve(answer: Callable[[Any], tuple[int, Any]]) -> Told:
        told = Told("", [])

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                told.requests.append((self.path, dict(self.headers), body))
                status, reply = answer(body)
                data = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                return

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        told.url = f"http://127.0.0.1:{server.server_port}/v1"
        return told

    yield serve
    for server in servers:
        server.shutdown()
