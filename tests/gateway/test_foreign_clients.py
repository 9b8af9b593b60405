"""Clients written by others, unmodified: `runpod` and `openai` for Python here, for Node in test_node.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest

from tests.gateway.conftest import EXAMPLE, KEYS, Front

HERE = Path(__file__).parent


def test_the_runpod_client_runs_watches_streams_and_cancels(front: Front) -> None:
    front.script("long-1", steps=100_000)
    environment = {**os.environ, "RUNPOD_ENDPOINT_BASE_URL": f"{front.url}/v2", "HOME": str(front.root)}
    command = [sys.executable, str(HERE / "runpod_client.py"), json.dumps(front.input())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["id"] == front.input()["job_id"]
    assert seen["first"] in ("IN_QUEUE", "IN_PROGRESS", "COMPLETED")
    assert (seen["last"], seen["output"]["progress"], seen["sync"]) == ("COMPLETED", 100, 100)
    assert httpx.get(seen["output"]["model_files"]["manifest.json"]).status_code == 200
    assert (seen["cancelled"], seen["after"]) == ("CANCELLED", "CANCELLED")
    assert seen["health"]["jobs"]["completed"] == 1
    assert seen["purged"] == {"removed": 0, "status": "completed"}
    assert "401" in seen["wrong"]


def test_the_openai_client_uploads_trains_lists_and_reads_events(front: Front) -> None:
    client = openai.OpenAI(base_url=f"{front.url}/v1", api_key=KEYS["acme"], max_retries=0)
    uploaded = client.files.create(file=EXAMPLE.open("rb"), purpose="fine-tune")
    assert (uploaded.bytes, uploaded.filename) == (EXAMPLE.stat().st_size, EXAMPLE.name)
    assert client.files.retrieve(uploaded.id).status == "processed"
    job = client.fine_tuning.jobs.create(
        model="lorry/smoke",
        training_file=uploaded.id,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
        seed=7,
        metadata={"order": "12"},
    )
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size, job.seed) == (2, 4, 7)
    front.finish(job.id)
    lines = [
        {
            "kind": "train",
            "at": 1.0,
            "attempt": 1,
            "epoch": 1,
            "step": n,
            "training_loss": 3.0 - n,
            "learning_rate": 0.1,
        }
        for n in (1, 2)
    ]
    (front.folder(job.id) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = client.fine_tuning.jobs.retrieve(job.id)
    assert (done.status, done.fine_tuned_model, done.error) == ("succeeded", f"lorry/smoke:{job.id}", None)
    assert done.metadata == {"order": "12"}
    assert [j.id for j in client.fine_tuning.jobs.list()] == [job.id]
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))  # two pages
    assert [e.message for e in events] == [
        "the adapter is proved and stored", "Step 2: training loss=1.0000", "Step 1: training loss=2.0000",
        "Created fine-tuning job",
    ]  # fmt: skip
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert [(c.step_number, c.metrics.train_loss) for c in checkpoints] == [(4, None), (2, 1.0)]


def test_the_openai_client_cancels_and_hears_of_mistakes(front: Front) -> None:
    client = openai.OpenAI(base_url=f"{front.url}/v1", api_key=KEYS["acme"], max_retries=0)
    job = client.fine_tuning.jobs.create(model="lorry/smoke", training_file=f"{front.sets.url}/set.jsonl")
    assert client.fine_tuning.jobs.cancel(job.id).status in ("cancelled", "succeeded")
    with pytest.raises(openai.NotFoundError, match="no such job"):
        client.fine_tuning.jobs.retrieve("ftjob-of-nobody")
    with pytest.raises(openai.BadRequestError, match="unknown model"):
        client.fine_tuning.jobs.create(model="gpt-4.1", training_file=f"{front.sets.url}/set.jsonl")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{front.url}/v1", api_key="wrong", max_retries=0).fine_tuning.jobs.list()
