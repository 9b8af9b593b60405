"""The end of a client on the servers of the private model: what its places say it has there, and unloading all of it.

there = traces(open_store(client_store(root, "acme"))); left = leave(there, "acme", connect)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from recipes.job import Record
from recipes.serving import Place
from scripts.serving.client import NoAnswer, Vllm
from scripts.serving.history import history, place_names
from scripts.store import Store


@dataclass(frozen=True)
class Traces:
    """The servers that a client's adapters were ever published to, and URLs of the folders they were copied to."""

    servers: tuple[Place, ...] = ()
    folders: tuple[str, ...] = ()


class Left(Record):
    """One server after the client left it."""

    url: str
    unloaded: int
    sentence: str


def traces(jobs: Store) -> Traces:
    """What all states of all places of the client name. Raises VerificationFailed for a state that is damaged."""
    places = [state.place for name in place_names(jobs) for state in history(jobs, name)]
    servers = {place.url: place for place in places}
    return Traces(tuple(servers.values()), tuple(sorted({place.adapters for place in places})))


def leave(there: Traces, client: str, connect: Callable[[Place], Vllm]) -> list[Left]:
    """Unloads every adapter of the client. Raises ProviderError for a server that answers and refuses.

    A server that does not answer holds nothing after its next start: what is loaded at runtime is forgotten then.
    """
    done = []
    for place in there.servers:
        with connect(place) as vllm:
            try:
                names = [name for name in vllm.names() if name.startswith(f"clients/{client}/")]
                vllm.forget(names)
                done.append(Left(url=place.url, unloaded=len(names), sentence="no adapter of the client is loaded"))
            except NoAnswer:
                said = "it did not answer; where it still runs, start it anew: it forgets what was loaded"
                done.append(Left(url=place.url, unloaded=0, sentence=said))
    return done
