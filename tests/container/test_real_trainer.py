"""The real trainer under the container: two ranks of DeepSpeed, stopped, killed, resumed, proved."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path

import pytest

from recipes.catalog import load_catalog
from recipes.job import Metric
from recipes.load import LoadedRecipe, load_recipe, recipe_sha256
from recipes.recipe import Recipe
from scripts.adapter import verify_adapter
from scripts.job_lock import lock_owner
from scripts.models import model_folder
from scripts.plan import make_plan
from scripts.render import render
from scripts.store import open_store
from scripts.tokenizer import find_tokenizer
from scripts.training_set import prepare
from scripts.watch import watch
from tests.container.conftest import REPOSITORY, Job


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """The smoke recipe with ten steps on the training set that ships; its base model has still to be made."""
    smoke = load_recipe("smoke/zero3")
    values = smoke.recipe.model_dump()
    values["training"] |= {"max_steps": 10, "checkpoint_steps": 3}
    recipe = Recipe.model_validate(values)
    loaded, catalog = LoadedRecipe(smoke.name, recipe, recipe_sha256(recipe)), load_catalog()
    store = open_store((tmp_path / "store").as_uri())
    tokenizer = find_tokenizer(recipe.base.id, [REPOSITORY / "recipes" / "smoke"])
    source = REPOSITORY / "examples" / "bicycle-care.jsonl"
    report = prepare(source, tmp_path / "data", recipe.data, recipe.training.seed, tokenizer)
    plan = make_plan(loaded, report, catalog)
    spec = render(loaded, plan, report, catalog, job_id="real-1", backend="local", store=store.url, commit=None)
    environment = {**os.environ, "LORRY_MODELS": str(tmp_path / "models")}
    return Job(store, tmp_path / "store" / "real-1", environment, spec, tmp_path / "data", "scripts.container")


def ranks(job: Job) -> list[int]:
    """The workers of torchrun: processes of the job that run the trainer itself."""
    found = []
    for pid in job.processes():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"trainer.train" in words and b"torch.distributed.run" not in words:
            found.append(pid)
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_stopped_by_its_machine_and_robbed_of_a_rank_the_real_trainer_still_brings_an_adapter(job: Job) -> None:
    job.launch()
    job.wait(lambda: (s := job.files().status) and s.step >= 1, seconds=200)
    owner = lock_owner(job.folder)
    assert owner is not None
    os.kill(owner.pid, signal.SIGTERM)
    files = job.finish()
    assert files.container is not None
    assert files.container.ended is None, job.log()
    assert list(job.folder.glob("checkpoints/*/COMPLETE"))
    assert not job.processes()

    job.launch()
    job.wait(lambda: (s := job.files().status) and s.attempt == 2 and s.step >= 4 and len(ranks(job)) == 2, seconds=200)
    os.kill(ranks(job)[-1], signal.SIGKILL)
    out = io.StringIO()
    state = watch(job.store, "real-1", job.backend, out, poll_seconds=0.2)
    assert state.state == "completed", job.log() + out.getvalue()
    files = job.finish()
    assert files.container is not None
    assert [a.number for a in files.container.attempts] == [1, 2, 3], job.log()
    assert (files.container.attempts[2].resumed_from or "") >= "step-000003"
    manifest = verify_adapter(job.folder / "adapter", base_model="lorry/smoke")
    assert manifest.effect > 0
    assert model_folder(Path(job.environment["LORRY_MODELS"]), "lorry/smoke").is_dir()
    lines = [Metric.model_validate_json(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    assert [m.step for m in lines if m.kind == "train"] == list(range(1, 11))
    assert not job.processes()
