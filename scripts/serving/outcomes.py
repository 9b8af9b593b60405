"""How users' own chats end: counts that the web app sends per adapter, and whether they speak against the adapter.

keep(store, "main", "bicycle-2", told, now)
complaint(counted(store, "main", "bicycle-2", since, now))      # None, or a sentence

The server cannot say it: vLLM counts the requests of adapters under the base's name, and Runpod those of a whole
endpoint. The web app knows which adapter it asked and whether anything came back. Each of its processes sends its own
totals of the five minutes that are running, over and over: a message that is lost or comes twice changes nothing.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, ValidationError

from recipes.recipe import Strict
from recipes.serving import Outcomes
from scripts.errors import InputError, Problem
from scripts.serving.probe import MOST_FAILED
from scripts.store import Store

FOLDER = "_outcomes"
"No job can have this name."
WINDOW_SECONDS = 300
WINDOWS = 12
"An hour: what failed before is over."
LEAST_FAILED = 5
"""Fewer failures are chance: where one chat in a hundred fails by itself, five or more of 100 do once in 300 looks
(binomial: 0.3 %), and five or more of 20 once in 800,000."""
_MOST = 10**9


class Told(Strict):
    """What a process of the web app says."""

    model: Annotated[str, Field(max_length=200)]
    "The adapter's name on the server, as GET /adapters gives it."
    reporter: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{7,63}$")]
    "Made up by the process at its start, such as a uuid: it alone writes under this name."
    window: Annotated[int, Field(ge=0, le=_MOST)]
    "Unix time over 300, without its fraction."
    answered: Annotated[int, Field(ge=0, le=_MOST)]
    failed: Annotated[int, Field(ge=0, le=_MOST)]


def keep(store: Store, place: str, job_id: str, told: Told, now: float) -> None:
    """Writes the totals over smaller ones of the same process: messages may overtake each other.

    Raises InputError for a wrong clock.
    """
    current = int(now // WINDOW_SECONDS)
    if abs(told.window - current) > 1:
        raise InputError(Problem("window", str(told.window), f"{current}: Unix time over {WINDOW_SECONDS}"))
    totals = Outcomes(answered=told.answered, failed=told.failed)
    key = f"{_folder(place, job_id, told.window)}/{told.reporter}.json"
    if _asked(totals) > _asked(_read(store, key)):
        store.write(key, totals.model_dump_json().encode() + b"\n")


def counted(store: Store, place: str, job_id: str, since: float, now: float) -> Outcomes:
    """The totals of the last hour, in windows that began at `since` or later."""
    answered = failed = 0
    newest = int(now // WINDOW_SECONDS) + 1
    for window in range(newest - WINDOWS, newest + 1):
        if window * WINDOW_SECONDS < since:
            continue
        for key in store.keys(_folder(place, job_id, window)):
            totals = _read(store, key)
            answered, failed = answered + totals.answered, failed + totals.failed
    return Outcomes(answered=answered, failed=failed)


def complaint(totals: Outcomes) -> str | None:
    """Why users' chats speak against the adapter; None when they do not."""
    asked = _asked(totals)
    if totals.failed < LEAST_FAILED or totals.failed <= MOST_FAILED * asked:
        return None
    return f"{totals.failed} of {asked} of the users' own chats failed; at most {MOST_FAILED:.0%}"


def _folder(place: str, job_id: str, window: int) -> str:
    return f"{FOLDER}/{place}/{job_id}/{window}"


def _asked(totals: Outcomes) -> int:
    return totals.answered + totals.failed


def _read(store: Store, key: str) -> Outcomes:
    try:
        return Outcomes.model_validate_json(store.read(key) or b"{}")
    except ValidationError:  # a damaged count says nothing, for or against
        return Outcomes()
