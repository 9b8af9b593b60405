"""What a queue job says of its training, in the words of the front door: progress on the way, the adapter at the end.

look = look_at(order, client, now); progress(look); output_of(look, now)      # raises TrainingFailed without an adapter
"""

from __future__ import annotations

from recipes.job import LaunchSpec
from scripts.errors import Problem, TrainingFailed
from scripts.gateway.clients import Client
from scripts.gateway.contact import Look
from scripts.gateway.door import Room
from scripts.gateway.links import adapter_links
from scripts.gateway.records import Request, Understood, read
from scripts.gateway.views import Json, adapter_files, phase_of, queue_status
from scripts.job_folder import read_job
from scripts.queue_order import Order
from scripts.state import job_state
from scripts.store import FileStore

GOES_ON = "launched or retried, it goes on from its newest checkpoint"


def look_at(order: Order, client: Client, now: float) -> Look:
    """The job of an order as its client would see it. Raises ProviderError."""
    files = read_job(order.store, order.job_id)
    request = read(order.store, f"{order.job_id}/request.json", Request)
    assert files.launch is not None, "an order is of a job that is launched"
    room = Room(client, order.store, order.store, order.store)
    return Look(order.client_id, request or _request(files.launch, client), files, job_state(files, None, now), room)


def output_of(look: Look, now: float) -> Json:
    """The `output` of a job that has its adapter. Raises TrainingFailed, with the sentence, for any other."""
    if phase_of(look) == "COMPLETED":
        output: Json = queue_status(look, _links(look, now), now)["output"]
        return output
    sentence = (
        look.state.sentence if look.state.is_final else f"its container is gone: {look.state.sentence}; {GOES_ON}"
    )
    raise TrainingFailed(Problem(f"job {look.client_id}", sentence))


def _links(look: Look, now: float) -> dict[str, str]:
    """Links that need no key. A store on this disk has none, but whoever can read it can read its files."""
    names, job_id = adapter_files(look), look.files.job_id
    if isinstance(look.room.jobs, FileStore):
        return {name: (look.room.jobs.root / job_id / "adapter" / name).as_uri() for name in names}
    return adapter_links(look.room, job_id, names, base_url="", secret="", now=now)


def _request(spec: LaunchSpec, client: Client) -> Request:
    """What stands for the request of a job that was launched from a terminal."""
    train, adapter = spec.recipe.training, spec.recipe.adapter
    understood = Understood(
        recipe=spec.recipe_name,
        base_model=spec.recipe.base.id,
        epochs=train.epochs,
        learning_rate=train.learning_rate,
        batch_size=train.global_batch,
        rank=adapter.rank,
        alpha=adapter.alpha,
    )
    return Request(client=client.name, job_id=spec.job_id, body_sha256="", received_at=0.0, understood=understood)
