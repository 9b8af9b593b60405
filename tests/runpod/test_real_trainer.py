"""The real trainer in a Pod of the local Runpod: data and adapter in a bucket, its keys from Runpod secrets."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes.catalog import load_catalog
from recipes.job import LaunchSpec
from recipes.load import LoadedRecipe, load_recipe, recipe_sha256
from recipes.recipe import BackendName, Recipe
from scripts.backends.runpod_api import RunpodApi
from scripts.cost import pod_bill
from scripts.fake_runpod.host import Host
from scripts.fake_runpod.processes import ProcessRunner
from scripts.fake_runpod.server import LocalRunpod, serve
from scripts.fake_runpod.store import serve_store
from scripts.plan import make_plan
from scripts.pull import pull
from scripts.render import render
from scripts.store import open_store
from scripts.tokenizer import find_tokenizer
from scripts.training_set import prepare
from scripts.watch import watch
from tests.runpod.conftest import IMAGE, KEY, OPENAPI, REPOSITORY, Room

CANARIES = {"store_id": "CANARYACCESSKEY", "store_key": "CANARY-secret-access-key", "hf": "hf_CANARY_token"}


@pytest.fixture
def runpod(tmp_path: Path) -> Iterator[LocalRunpod]:
    """A local Runpod whose Pods run the container itself."""
    with serve(KEY, OPENAPI, host=Host(tmp_path / "host", ProcessRunner())) as local:
        yield local
        assert local.drift == []


def smoke_spec(data: Path, job_id: str, backend: BackendName = "runpod_pod", max_usd: float = 1.0) -> LaunchSpec:
    """The smoke recipe with four steps on the training set that ships, for one rented GPU; its set in `data`."""
    smoke = load_recipe("smoke/zero3")
    values = smoke.recipe.model_dump()
    values["training"] |= {"max_steps": 4}
    values["hardware"] |= {"backends": (backend,), "gpus": 1}
    values["limits"] |= {"max_usd": max_usd}
    recipe = Recipe.model_validate(values)
    loaded, catalog = LoadedRecipe(smoke.name, recipe, recipe_sha256(recipe)), load_catalog()
    tokenizer = find_tokenizer(recipe.base.id, [REPOSITORY / "recipes" / "smoke"])
    source = REPOSITORY / "examples" / "bicycle-care.jsonl"
    report = prepare(source, data, recipe.data, recipe.training.seed, tokenizer)
    plan, store = make_plan(loaded, report, catalog), "s3://bucket/jobs"
    return render(loaded, plan, report, catalog, job_id=job_id, backend=backend, store=store, commit=None)


@pytest.fixture
def room(runpod: LocalRunpod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Room]:
    """One such job, its store in a bucket."""
    spec = smoke_spec(tmp_path / "data", "real-1")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    with serve_store("bucket") as url:
        plain = {"AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1"}
        keys = {"AWS_ACCESS_KEY_ID": "mine", "AWS_SECRET_ACCESS_KEY": "mine", "AWS_EC2_METADATA_DISABLED": "true"}
        for name, value in (plain | keys).items():
            monkeypatch.setenv(name, value)
        store = open_store(spec.store)
        secrets = "AWS_ACCESS_KEY_ID=store_id,AWS_SECRET_ACCESS_KEY=store_key,HF_TOKEN=hf"
        environment = {"RUNPOD_API_KEY": KEY, "RUNPOD_API_BASE_URL": runpod.url, "LORRY_IMAGE": IMAGE, **plain}
        with RunpodApi(KEY, runpod.url) as api:
            for name, value in CANARIES.items():
                api.create("account/secrets", {"name": name, "value": value}, secret=True)
        runpod.log.clear()
        yield Room(runpod, store, tmp_path / "data", environment | {"LORRY_POD_SECRETS": secrets}, spec)


@pytest.mark.slow
def test_the_smoke_recipe_trains_in_a_pod_and_no_secret_is_left_anywhere(room: Room, tmp_path: Path) -> None:
    began = time.time()
    pod = room.launch().handle["pod"]
    out = io.StringIO()
    state = watch(room.store, "real-1", room.backend, out, poll_seconds=0.5)
    assert state.state == "completed", out.getvalue() + room.said()
    room.finish()
    manifest = pull(room.store, "real-1", tmp_path / "adapter")
    assert manifest.effect > 0
    assert (manifest.base_model, manifest.recipe_name) == ("lorry/smoke", "smoke/zero3")
    bill = room.billed()
    assert list(bill) == [pod]
    assert 0 < bill[pod] <= room.submissions[0].handle["usd_per_hour"] * (time.time() - began) / 3600
    assert _leaks(room, tmp_path / "host") == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_smoke_recipe_trains_on_a_cluster_of_two_pods(room: Room, tmp_path: Path) -> None:
    # A job id of its own: the buckets of moto outlive their server within one process.
    room.spec = room.spec.model_copy(update={"job_id": "real-2", "nodes": 2, "accumulation_steps": 1})
    room.runpod.cluster_keys_work = True
    cluster = room.launch().handle["cluster"]
    out = io.StringIO()
    state = watch(room.store, "real-2", room.backend, out, poll_seconds=0.5)
    assert state.state == "completed", out.getvalue() + room.said()
    room.finish()
    assert pull(room.store, "real-2", tmp_path / "adapter").effect > 0
    assert room.store.read("real-2/logs/trainer-1-node-1.log") is not None, "node 1 took part"
    with RunpodApi(KEY, room.runpod.url) as api:
        charges = pod_bill(api, room.store, room.files())
    assert charges is not None
    assert list(charges.usd) == [cluster]
    assert _leaks(room, tmp_path / "host") == []


def _leaks(room: Room, host: Path) -> list[str]:
    """Where a canary shows: requests, the Pods' logs, the job folder in the bucket, the Pods' disks."""
    secrets = [value.encode() for value in (*CANARIES.values(), KEY)]
    seen = [(f"{method} {path}", (path + body).encode()) for method, path, body in room.runpod.log]
    seen += [(key, room.store.read(key) or b"") for key in room.store.keys(room.spec.job_id)]
    seen += [(str(path), path.read_bytes()) for path in host.rglob("*") if path.is_file()]
    seen.append(("the log of a Pod", room.said().encode()))
    assert len(seen) > 30
    return [where for where, data in seen if any(secret in data for secret in secrets)]
