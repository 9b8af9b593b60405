"""What a queue job asks for: a job that a launcher has prepared, or a training in the words of the front door.

order = order_of(queue_job, settings, now); order.store, order.job_id

A launched job comes as {"job_id", "store", "number"}. Anything else is read like the body of the front door's /run: the
training set is fetched, checked, planned and priced here, on the worker, before it is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from recipes.catalog import load_catalog
from recipes.job import LaunchSpec
from recipes.load import load_recipe
from recipes.recipe import BackendName
from scripts.backends.base import Handle, Observation, Owned, machine_name
from scripts.backends.runpod_queue_claims import QueueClaims, take
from scripts.errors import Conflict, InputError, NotFound, Problem, Refused
from scripts.gateway.clients import Client
from scripts.gateway.dataset import Fetcher
from scripts.gateway.door import Door
from scripts.gateway.settings import SWITCH, GatewaySettings
from scripts.gateway.submission import submit
from scripts.gateway.tailor import gpus_named
from scripts.gateway.understand import GpuConfig, understand
from scripts.job_folder import read_job
from scripts.job_token import CLIENT_NAME
from scripts.overstay import ended_at
from scripts.rooms import is_within
from scripts.settings import read_settings
from scripts.store import Store, open_store

Json = dict[str, Any]
NO_KEY = "0" * 64  # a worker opens no door: nobody's key has this hash
MOST_USD = 10_000.0


@dataclass(frozen=True)
class WorkerSettings:
    """root: the store whose jobs this endpoint may train. client: whose jobs those are that come without a launcher.
    gpu: what this worker has, as Runpod calls it. worker, endpoint: Runpod's ids."""

    root: str
    client: Client
    worker: str
    endpoint: str
    gpu: GpuConfig
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Order:
    """One job of ours that this worker is to train. superseded: another queue job does."""

    store: Store
    job_id: str
    client_id: str
    superseded: bool = False

    def has_ended(self) -> bool:
        """Whether there is nothing left to train. Raises ProviderError."""
        return ended_at(read_job(self.store, self.job_id)) is not None


def read_worker_settings(environment: Mapping[str, str]) -> WorkerSettings:
    """Settings from LORRY_STORE, LORRY_RECIPE, LORRY_CLIENT (default: endpoint), LORRY_MAX_USD_PER_MONTH and what
    Runpod sets. Raises InputError."""
    name, recipe = environment.get("LORRY_CLIENT", "endpoint"), environment.get("LORRY_RECIPE", "")
    if not environment.get("LORRY_STORE"):
        raise InputError(Problem("LORRY_STORE", "not set", "the store whose jobs this endpoint may train"))
    if not CLIENT_NAME.fullmatch(name):
        raise InputError(Problem("LORRY_CLIENT", ascii(name), "2 to 32 of a-z, 0-9 and hyphens"))
    if recipe:
        load_recipe(recipe)
    take_url = environment.get("RUNPOD_WEBHOOK_GET_JOB", "")
    gpu = parse_qs(urlsplit(take_url).query).get("gpu", [""])[0]
    count = environment.get("RUNPOD_GPU_COUNT", "1")
    return WorkerSettings(
        root=environment["LORRY_STORE"].rstrip("/"),
        client=_client(name, recipe, environment.get("LORRY_MAX_USD_PER_MONTH", "250")),
        worker=environment.get("RUNPOD_POD_ID", ""),
        endpoint=environment.get("RUNPOD_ENDPOINT_ID", ""),
        gpu=GpuConfig(type=gpu or None, count=int(count) if count.isdecimal() and int(count) else 1),
        environment=environment,
    )


def _client(name: str, recipe: str, usd_per_month: str) -> Client:
    """Each job is capped by its recipe, all of a month by a variable of the endpoint."""
    try:
        most = float(usd_per_month)
    except ValueError:
        raise InputError(
            Problem("LORRY_MAX_USD_PER_MONTH", ascii(usd_per_month[:40]), "dollars, such as 250")
        ) from None
    return Client(name=name, key_sha256=(NO_KEY,), recipe=recipe, max_usd_per_job=MOST_USD, max_usd_per_month=most)


def order_of(job: Json, settings: WorkerSettings, now: Callable[[], float]) -> Order:
    """The order, recorded and taken: no other queue job will train it. Asked again for the same queue job, it is the
    same order. Raises InputError, Refused, NotFound, Conflict, ProviderError."""
    value = job["input"]
    if not isinstance(value, dict):
        raise InputError(Problem("input", "not an object", '{"input": {...}}'))
    if "store" in value:
        return _launched(str(job["id"]), value, settings, now)
    return _asked(job, value, settings, now)


def _launched(queue_id: str, value: Json, settings: WorkerSettings, now: Callable[[], float]) -> Order:
    url, job_id, number = str(value["store"]), str(value.get("job_id")), value.get("number")
    if not is_within(settings.root, url):
        raise Refused(Problem("input.store", ascii(url[:200]), f"a store of this endpoint: {settings.root}"))
    store = open_store(url)
    if read_job(store, job_id).launch is None or not isinstance(number, int):
        raise NotFound(Problem(f"job {job_id[:80]!a}", f"no such job in {url}", "launch it with `lorry launch`"))
    newest = QueueClaims(store, job_id, now).newest()
    mine = take(store, job_id, number, queue_id=queue_id, worker=settings.worker, now=now())
    is_newest = newest is None or newest.number <= number
    return Order(store, job_id, job_id, superseded=mine.queue_id != queue_id or not is_newest)


def _asked(job: Json, value: Json, settings: WorkerSettings, now: Callable[[], float]) -> Order:
    asked = understand(value)
    if not settings.client.recipe and asked.base_model is None:
        raise InputError(Problem("input.base_model", "missing", "a base model, or LORRY_RECIPE on the endpoint"))
    queue_id = str(job["id"])
    asked = replace(asked, job_id=asked.job_id or queue_id, gpu=settings.gpu)
    here = Here(queue_id, settings, now)
    door = _door(settings, here, now)
    accepted = submit(door, settings.client, asked)
    job_id, store = accepted.request.job_id, door.room(settings.client).jobs
    mine = take(store, job_id, 1, queue_id=queue_id, worker=settings.worker, now=now())
    order = Order(store, job_id, asked.job_id or job_id)
    if mine.queue_id != queue_id and not order.has_ended():
        said = f"it is the work of queue job {mine.queue_id}"
        raise Conflict(Problem(f"job {order.client_id}", said, "ask for the status of that one"))
    return order


def _door(settings: WorkerSettings, here: Here, now: Callable[[], float]) -> Door:
    """The front door's way to a job, with this worker as the only machine."""
    loopback = settings.environment.get("LORRY_ALLOW_LOOPBACK") == SWITCH
    local = read_settings(settings.environment, Path.cwd())
    chosen = GatewaySettings(store=settings.root, tokenizers=local.tokenizers, token_secret="", backend=here.name)
    return Door(
        chosen,
        {settings.client.name: settings.client},
        settings.environment,
        open_backend=lambda name, environment: here,
        fetcher=Fetcher(allows_loopback=loopback),
        now=now,
    )


@dataclass
class Here:
    """The backend of a training that came to the queue without a launcher: its machine is the worker that asks."""

    queue_id: str
    settings: WorkerSettings
    now: Callable[[], float]
    name: BackendName = "runpod_queue"

    def request(self, spec: LaunchSpec) -> dict[str, Any]:
        """What is asked of the provider: nothing more. Raises Refused where the plan is for another GPU."""
        offer, gpu = load_catalog().offers.get(spec.offer or ""), self.settings.gpu
        if offer is None or (gpu.type and offer.gpu not in gpus_named(gpu.type)) or spec.gpus != gpu.count:
            said = f"the plan is for {spec.offer}, this worker has {gpu.count} x {gpu.type}"
            raise Refused(Problem("gpu", said, "an endpoint with another pool, or another recipe"))
        return {"queue": self.queue_id}

    def submit(self, spec: LaunchSpec, request: Mapping[str, Any]) -> dict[str, Any]:
        """The handle by which the queue's backend finds this job."""
        usd = load_catalog().offers[spec.offer or ""].usd_per_hour
        about = {"queue": self.queue_id, "endpoint": self.settings.endpoint, "name": machine_name(spec.job_id)}
        return {**about, "number": 1, "run_by": self.now(), "usd_per_hour": usd}

    def observe(self, handle: Handle) -> Observation:
        """Who asks is the machine."""
        return Observation("running", f"worker {self.settings.worker}")

    def stop(self, handle: Handle) -> None:
        """The stop is recorded; the container heeds it."""

    def owned(self) -> list[Owned]:
        """A worker looks after its own job alone."""
        return []
