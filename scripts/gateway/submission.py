"""The one way by which every protocol starts a job: understand, record, fetch, check, plan, keep to the caps, launch.

accepted = submit(door, client, asked, key=request.headers.get("idempotency-key"))

One job id, or one idempotency key, never makes two jobs; sent again, a request goes on where the first one ended.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import uuid
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from recipes.catalog import Catalog, load_catalog
from recipes.job import LaunchSpec
from recipes.load import LoadedRecipe, load_recipe
from recipes.preparation import Plan, TrainingSetReport
from recipes.recipe import BackendName
from scripts.audit import record
from scripts.errors import Conflict, InputError, LorryError, NotFound, Problem, ProviderError
from scripts.gateway.budget import reserve
from scripts.gateway.clients import Client, known_models
from scripts.gateway.dataset import checked_url, fetch
from scripts.gateway.door import Door, Room
from scripts.gateway.records import Refusal, Request, Understood, as_bytes, read
from scripts.gateway.tailor import gpus_named, recipe_name, tailored, wish_text, wished_offer, with_gpu
from scripts.gateway.understand import Asked, job_id_of
from scripts.launch import launch
from scripts.plan import make_plan
from scripts.render import render
from scripts.training_set import prepare
from scripts.training_set.reasoning import require_reasoning

_KEY = re.compile(r"[\x21-\x7e]{1,255}")


@dataclass(frozen=True)
class Planned:
    """A request that could be launched: what it will do, where, and for how much."""

    loaded: LoadedRecipe
    plan: Plan
    report: TrainingSetReport | None
    spec: LaunchSpec
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Accepted:
    """A job that is launched. notes: what a person should know; is_new: whether this very request launched it."""

    request: Request
    spec: LaunchSpec
    notes: tuple[str, ...] = ()
    is_new: bool = False


def submit(door: Door, client: Client, asked: Asked, key: str | None = None) -> Accepted:
    """Starts the job that is asked for, or finds it started.

    Raises InputError for what is wrong with the request or the training set, Conflict when its id or key stands for
    another request, Refused when nothing fits or a cap is passed, ProviderError when store or provider fail; in that
    last case sending the same again is right.
    """
    room = door.room(client)
    loaded = tailored(_recipe(recipe_name(asked, client, known_models(client.recipe))), asked, client.max_usd_per_job)
    _require_training_set(door, room, asked)
    job_id = _job_id(room, asked, key)
    with door.one_at_a_time(client, job_id):
        request = _recorded(door, room, job_id, asked, loaded, key)
        data = room.jobs.read(f"{job_id}/launch.json")
        if data is not None:
            return Accepted(request, _started(door, room, LaunchSpec.model_validate_json(data), None, Path()))
        record(room.notes, "launch", job_id, who=f"client {client.name}", now=door.now(), note=loaded.name)
        try:
            return _begin(door, room, request, asked, loaded)
        except LorryError as error:
            if error.code in ("bad_input", "refused", "not_found"):
                _refuse(room, request, error, door.now())
            elif isinstance(error, ProviderError) and room.jobs.read(f"{job_id}/submission.json") is not None:
                kept = "it is kept, and a machine is asked for again"
                step = "ask for its status instead of sending it under another id"
                raise ProviderError(*error.problems, Problem(f"job {asked.job_id or job_id}", kept, step)) from None
            raise


def quote(door: Door, client: Client, asked: Asked) -> Planned:
    """What the job would do and cost; nothing is started or kept. Without a training set, for a nominal one."""
    room = door.room(client)
    loaded = tailored(_recipe(recipe_name(asked, client, known_models(client.recipe))), asked, client.max_usd_per_job)
    with tempfile.TemporaryDirectory(prefix="lorry-quote-") as folder:
        given = bool(asked.dataset_url or asked.file_id)
        report = _checked_set(door, room, asked, loaded, Path(folder)) if given else None
    return _planned(door, room, asked, loaded, report, "quote")


def understood_of(asked: Asked, loaded: LoadedRecipe) -> Understood:
    """What goes back to the client as the meaning of its request."""
    recipe = loaded.recipe
    return Understood(
        recipe=loaded.name,
        base_model=recipe.base.id,
        asked_model=asked.base_model,
        epochs=recipe.training.epochs,
        learning_rate=recipe.training.learning_rate,
        batch_size=recipe.training.global_batch,
        rank=recipe.adapter.rank,
        alpha=recipe.adapter.alpha,
        gpu_asked=wish_text(asked.gpu),
        ignored=asked.ignored,
    )


def _require_training_set(door: Door, room: Room, asked: Asked) -> None:
    """Refuses what cannot be one before anything is recorded."""
    if not (asked.dataset_url or asked.file_id):
        raise InputError(Problem("input.dataset_url", "missing", "an https link to the training set"))
    if asked.dataset_url:
        checked_url(asked.dataset_url, door.fetcher)
    if asked.file_id and room.files.read(f"{asked.file_id}/file.json") is None:
        raise NotFound(Problem("training_file", f"no file {asked.file_id[:80]!a}", "upload it to /v1/files"))


def _job_id(room: Room, asked: Asked, key: str | None) -> str:
    """The job this request is for: the client's own id, else the one its idempotency key stands for, else a new one."""
    wanted = job_id_of(asked.job_id) if asked.job_id else None
    if key is None:
        return wanted or str(uuid.uuid4())
    if not _KEY.fullmatch(key):
        raise InputError(Problem("Idempotency-Key", ascii(key[:60]), "1 to 255 visible ASCII characters"))
    digest = hashlib.sha256(key.encode()).hexdigest()
    job_id = wanted or f"k{digest[:31]}"
    mine = json.dumps({"job_id": job_id, "body_sha256": asked.body_sha256}).encode()
    if room.notes.create(f"keys/{digest}.json", mine):
        return job_id
    known = json.loads(room.notes.read(f"keys/{digest}.json") or mine)
    if known["job_id"] != job_id or known["body_sha256"] != asked.body_sha256:
        request = read(room.jobs, f"{known['job_id']}/request.json", Request)
        if request is None or known["job_id"] != job_id or not _was_refused(room, request):
            raise _conflict("Idempotency-Key", known["job_id"])
        room.notes.write(f"keys/{digest}.json", mine)
    return job_id


def _recorded(door: Door, room: Room, job_id: str, asked: Asked, loaded: LoadedRecipe, key: str | None) -> Request:
    """request.json: the first request for a job wins it, unless it was refused and another one takes its place."""
    request = Request(
        client=room.client.name,
        job_id=job_id,
        client_job_id=asked.job_id,
        body_sha256=asked.body_sha256,
        idempotency_key=key,
        received_at=door.now(),
        understood=understood_of(asked, loaded),
        callback_url=asked.callback_url,
        training_file=asked.file_id,
        metadata=asked.metadata,
    )
    name = f"{job_id}/request.json"
    if room.jobs.create(name, as_bytes(request)):
        return request
    known = read(room.jobs, name, Request)
    if known is not None and known.body_sha256 == asked.body_sha256:
        return known
    if known is not None and not _was_refused(room, known):
        raise _conflict(f"job {job_id}", job_id)
    room.jobs.write(name, as_bytes(request))
    door.memory.forget(("request", room.client.name, job_id))
    return request


def _was_refused(room: Room, request: Request) -> bool:
    """Whether the recorded request became no job, so that a corrected one may have its id."""
    refusal = read(room.jobs, f"{request.job_id}/refusal.json", Refusal)
    launched = room.jobs.read(f"{request.job_id}/launch.json") is not None
    return not launched and refusal is not None and refusal.body_sha256 == request.body_sha256


def _conflict(where: str, job_id: str) -> Conflict:
    want = "send exactly the same request, or take another id"
    return Conflict(Problem(where, f"stands for another request already (job {job_id})", want))


def _begin(door: Door, room: Room, request: Request, asked: Asked, loaded: LoadedRecipe) -> Accepted:
    """The first launch of a job: everything that can refuse it comes before anything that costs."""
    with tempfile.TemporaryDirectory(prefix="lorry-submission-") as folder:
        data = Path(folder)
        report = _checked_set(door, room, asked, loaded, data)
        planned = _planned(door, room, asked, loaded, report, request.job_id)
        reserve(room, request.job_id, planned.spec.cap_usd, request.received_at)
        spec = _started(door, room, planned.spec, planned.plan, data)
    return Accepted(request, spec, planned.notes, is_new=True)


def _checked_set(door: Door, room: Room, asked: Asked, loaded: LoadedRecipe, folder: Path) -> TrainingSetReport:
    """The training set, fetched and in canonical form in `folder`."""
    recipe = loaded.recipe
    source = folder / "source" / _file_name(asked)
    source.parent.mkdir()
    if asked.file_id:
        room.files.get_file(f"{asked.file_id}/content", source)
    else:
        fetch(asked.dataset_url or "", source, door.fetcher)
    report = prepare(source, folder, recipe.data, recipe.training.seed, door.tokenizer(recipe.base.id))
    require_reasoning(report, recipe, load_catalog().models[recipe.base.id])
    source.unlink()
    return report


def _file_name(asked: Asked) -> str:
    """A harmless name for the file, near enough to the client's own that its sentences make sense."""
    last = unquote(urlsplit(asked.dataset_url or "").path).rpartition("/")[2] if asked.dataset_url else asked.file_id
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", last or "").strip(".-")[:80]
    return name or "training-set"


def _planned(
    door: Door, room: Room, asked: Asked, loaded: LoadedRecipe, report: TrainingSetReport | None, job_id: str
) -> Planned:
    """Plan and spec on the GPU the client wishes for where that can be had, else on the cheapest that fits."""
    catalog = _offered(loaded.recipe.hardware.backends)
    plan = make_plan(loaded, report, catalog)
    notes: tuple[str, ...] = ()
    wish, backend = wish_text(asked.gpu), door.settings.backend
    if wish and not loaded.recipe.hardware.gpus:
        offer = wished_offer(plan, asked.gpu, backend, catalog)
        if offer is not None and offer.offer != plan.chosen:
            loaded = with_gpu(loaded, offer, catalog)
            plan = make_plan(loaded, report, catalog)
    chosen = backend or _backend_of(plan, loaded)
    spec = render(
        loaded, plan, report, catalog, job_id=job_id, backend=chosen, store=room.jobs.url, commit=None
    )  # fmt: skip
    if wish and not _is_wished(spec, asked):
        notes = (f"{wish} was asked for; {spec.offer} is taken: it is what fits or what the recipe insists on.",)
    return Planned(loaded, plan, report, spec, notes + plan.notes + (report.notes if report else ()))


@lru_cache(maxsize=64)
def _recipe(name: str) -> LoadedRecipe:
    return load_recipe(name)


@lru_cache(maxsize=32)
def _offered(backends: tuple[BackendName, ...]) -> Catalog:
    """The catalog with the offers of these backends alone: judging all of them takes longer than everything else."""
    catalog = load_catalog()
    offers = {name: offer for name, offer in catalog.offers.items() if offer.backend in backends}
    return replace(catalog, offers=offers or catalog.offers)


def _is_wished(spec: LaunchSpec, asked: Asked) -> bool:
    facts = load_catalog().offers.get(spec.offer or "")
    right_kind = not asked.gpu.type or (facts is not None and facts.gpu in gpus_named(asked.gpu.type))
    return right_kind and asked.gpu.count in (None, spec.gpus)


def _backend_of(plan: Plan, loaded: LoadedRecipe) -> BackendName:
    chosen = load_catalog().offers.get(plan.chosen or "")
    return chosen.backend if chosen else loaded.recipe.hardware.backends[0]


def _started(door: Door, room: Room, spec: LaunchSpec, plan: Plan | None, data: Path) -> LaunchSpec:
    """The job, launched; one that has its machine already is left alone."""
    if not _has_machine(room, spec.job_id):
        launch(room.jobs, spec, plan, data, door.backend(spec.backend), door.now())
    return spec


def _has_machine(room: Room, job_id: str) -> bool:
    """Whether a machine was asked for and answered."""
    data = room.jobs.read(f"{job_id}/submission.json")
    return bool(data and json.loads(data).get("handle"))


def _refuse(room: Room, request: Request, error: LorryError, now: float) -> None:
    told = error.as_json()
    refusal = Refusal(
        body_sha256=request.body_sha256, at=now, code=error.code, error=str(error), problems=tuple(told["problems"])  # type: ignore[arg-type]
    )  # fmt: skip
    room.jobs.write(f"{request.job_id}/refusal.json", as_bytes(refusal))
