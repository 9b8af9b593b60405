"""The states of a serving place in the store, one small object each: two publishers cannot both write the next one.

state = newest(store, "main"); following(store, "main", state, deed="publish", ...)
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError

from recipes.serving import Serving
from scripts.errors import Conflict, InputError, NotFound, Problem, VerificationFailed
from scripts.store import Store

FOLDER = "_serving"
"No job can have this name."
_PLACE = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")
_OF_A_CLIENT = re.compile(r"/(clients/[^/]+)/jobs$")
BUSY_SECONDS = 3600.0
"A deed that was begun this long ago and not finished was broken off."


def served_name(store: Store, job_id: str) -> str:
    """What the adapter of a job is called on a server, and its folder below the place's adapters.

    In the store of a client of the front door it stands below clients/NAME/: two clients may call a job alike.
    """
    found = _OF_A_CLIENT.search(store.url)
    return f"{found[1]}/{job_id}" if found else job_id


def place_names(store: Store) -> list[str]:
    """The places at which something of this store was ever published."""
    return sorted({key.split("/")[1] for key in store.keys(FOLDER)})


def history(store: Store, name: str) -> list[Serving]:
    """All states of a place, oldest first. Raises InputError for what cannot be a name, VerificationFailed."""
    return [_read(store, key) for key in _keys(store, name)]


def last_state(store: Store, name: str) -> Serving | None:
    """The state of a place now, without its history; None when nothing was ever published there."""
    keys = _keys(store, name)
    return _read(store, keys[-1]) if keys else None


def inference_settings(store: Store) -> dict[str, str]:
    """The web app's settings of the place `main`: where its chat goes, the model's name there, the canary's and its
    share of the conversations; empty where nothing was ever published."""
    state = last_state(store, "main")
    if state is None:
        return {}
    model = served_name(store, state.live) if state.live else state.place.base
    settings = {"INFERENCE_API_URL": state.place.url, "INFERENCE_MODEL": model}
    if state.canary:
        share = f"{state.canary_share:g}"
        settings |= {"INFERENCE_CANARY_MODEL": served_name(store, state.canary), "INFERENCE_CANARY_SHARE": share}
    return settings


def newest(store: Store, name: str) -> Serving:
    """The state of a place now. Raises NotFound when nothing was ever published there."""
    state = last_state(store, name)
    if state is None:
        want = "publish an adapter there: `lorry serve JOB --place`"
        raise NotFound(Problem(f"place {name}", "nothing was ever published there", want))
    return state


def following(store: Store, name: str, before: Serving | None, **changes: Any) -> Serving:
    """Writes the state after `before`. Raises Conflict when somebody else wrote it, or is at work there."""
    if changes.get("outcome") == "begun" and before:
        require_idle(name, before, **changes)
    number = before.number + 1 if before else 1
    fresh = {"canary": None, "canary_share": 0.0} if before is None else {}
    kept = before.model_dump(exclude={"sentence", "effect", "error"}) if before else fresh
    state = Serving.model_validate({**kept, **changes, "number": number})
    if not store.create(f"{FOLDER}/{name}/{number:08d}.json", state.model_dump_json(indent=2).encode() + b"\n"):
        raise Conflict(
            Problem(f"place {name}", "somebody else published there at the same time", "look, then try again")
        )
    return state


def require_idle(name: str, before: Serving, *, at: float, **deed: Any) -> None:
    """Raises Conflict when somebody else, or the same one with something else, began and may not be through with it.

    The same deed by the same hand is one that was broken off and goes on.
    """
    same = all(getattr(before, field) == deed[field] for field in ("deed", "job_id", "by"))
    if before.outcome == "begun" and not same and at - before.at < BUSY_SECONDS:
        got = f"{before.by} began to {before.deed} {before.job_id} and has not finished"
        raise Conflict(Problem(f"place {name}", got, "wait for it, or an hour"))


def _keys(store: Store, name: str) -> list[str]:
    if not _PLACE.fullmatch(name):
        raise InputError(Problem("--place", ascii(name[:60]), "1 to 32 of a-z, 0-9 and inner hyphens"))
    return store.keys(f"{FOLDER}/{name}")


def _read(store: Store, key: str) -> Serving:
    try:
        return Serving.model_validate_json(store.read(key) or b"")
    except ValidationError:
        raise VerificationFailed(Problem(f"{store.url}/{key}", "not a state of a place", "restore it")) from None
