"""What is due for a job is done when its client asks for it: after the answer, and not at every question."""

from __future__ import annotations

from scripts.errors import LorryError
from scripts.gateway.door import Door
from scripts.gateway.http import Call, log
from scripts.gateway.understand import job_id_of

TICK_SECONDS = 30.0


def tick_on_contact(door: Door, call: Call) -> None:
    """Calls the door's tick for the job in the path, at most every 30 s. A failure waits for the next contact."""
    job_id = job_id_of(call.path["id"])
    key = ("ticked", call.client.name, job_id)
    if door.tick is None or door.now() - (door.memory.get(key) or 0.0) < TICK_SECONDS:
        return
    door.memory.keep(key, door.now())
    try:
        door.tick(call.client, job_id)
    except LorryError as error:
        log.warning("tick of %s: %s", job_id, error.code)
