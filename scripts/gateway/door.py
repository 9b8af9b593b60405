"""What all protocols of the front door share: settings, clients, backends, the clock, and each client's own store.

door = Door(settings, clients); room = door.room(client); room.jobs.read("job-1/status.json")

Nothing of a job is kept here: what is remembered only spares reading again what never changes.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from recipes.recipe import BackendName
from scripts.backends import open_backend
from scripts.backends.base import Backend
from scripts.gateway.clients import Client
from scripts.gateway.dataset import Fetcher
from scripts.gateway.settings import GatewaySettings
from scripts.store import Store, open_store
from scripts.tokenizer import ChatTokenizer, find_tokenizer

OpenBackend = Callable[[BackendName, Mapping[str, str]], Backend]
Tick = Callable[[Client, str], None]
"(client, job id): does what is due for a job: callbacks, settlement."
Value = TypeVar("Value")

_REMEMBERED = 5_000  # a finished job takes some 15 KiB


@dataclass(frozen=True)
class Room:
    """The three stores of one client; nothing outside them is reachable with its key."""

    client: Client
    jobs: Store
    files: Store
    "Uploaded training sets."
    notes: Store
    "Idempotency keys, and what each month's jobs may cost."


class Memory:
    """The last few thousand facts that cannot change any more."""

    def __init__(self) -> None:
        self._facts: OrderedDict[tuple[str, ...], Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, ...]) -> Any:
        with self._lock:
            if key in self._facts:
                self._facts.move_to_end(key)
            return self._facts.get(key)

    def keep(self, key: tuple[str, ...], value: Value) -> Value:
        with self._lock:
            self._facts[key] = value
            if len(self._facts) > _REMEMBERED:
                self._facts.popitem(last=False)
        return value

    def forget(self, key: tuple[str, ...]) -> None:
        with self._lock:
            self._facts.pop(key, None)


@dataclass
class Door:
    """The front door: made once, shared by all requests."""

    settings: GatewaySettings
    clients: Mapping[str, Client]
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    open_backend: OpenBackend = open_backend
    fetcher: Fetcher = field(default_factory=Fetcher)
    tick: Tick | None = None
    now: Callable[[], float] = time.time
    memory: Memory = field(default_factory=Memory)
    _locks: dict[tuple[str, str], tuple[threading.Lock, int]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def room(self, client: Client) -> Room:
        """The stores of a client."""
        known: Room | None = self.memory.get(("room", client.name))
        if known is not None:
            return known
        base = f"{self.settings.store}/clients/{client.name}"
        room = Room(client, open_store(f"{base}/jobs"), open_store(f"{base}/files"), open_store(f"{base}/notes"))
        return self.memory.keep(("room", client.name), room)

    def backend(self, name: BackendName) -> Backend:
        """The backend of that name. A machine of this host gets none of the front door's own secrets."""
        known: Backend | None = self.memory.get(("backend", name))
        if known is not None:
            return known
        environment = dict(self.environment)
        if name == "local":
            environment = {k: v for k, v in environment.items() if k not in ("LORRY_TOKEN_SECRET", "LORRY_CLIENTS")}
        if self.settings.public_url:
            environment["LORRY_FRONT_DOOR"] = self.settings.public_url
        return self.memory.keep(("backend", name), self.open_backend(name, environment))

    def tokenizer(self, model: str) -> ChatTokenizer | None:
        """The tokenizer of a base model, where it is at hand."""
        found = self.memory.get(("tokenizer", model))
        return found or self.memory.keep(("tokenizer", model), find_tokenizer(model, self.settings.tokenizers))

    @contextmanager
    def one_at_a_time(self, client: Client, job_id: str) -> Iterator[None]:
        """Requests for one job wait for each other, so that fifty of them fetch the training set once."""
        key = (client.name, job_id)
        with self._lock:
            lock, users = self._locks.get(key, (threading.Lock(), 0))
            self._locks[key] = (lock, users + 1)
        try:
            with lock:
                yield
        finally:
            with self._lock:
                lock, users = self._locks[key]
                if users == 1:
                    del self._locks[key]
                else:
                    self._locks[key] = (lock, users - 1)
