"""Whose jobs there are: the store of the terminal and one per client, each with how that client hears of its jobs.

for room in open_rooms(os.environ, settings.store): tick([room], open_hands(os.environ))
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import httpx

from recipes.recipe import BackendName
from scripts.backends import open_backend
from scripts.backends.base import Backend, Charges, KnowsCharges
from scripts.backends.runpod_api import BASE_URL, RunpodApi
from scripts.cost import Bill, pod_bill
from scripts.ears import Ears
from scripts.errors import InputError, Problem
from scripts.gateway.clients import Client, load_clients
from scripts.job_folder import JobFiles
from scripts.job_token import CLIENT_NAME
from scripts.store import Store, open_store
from scripts.supabase import SupabaseRows
from scripts.tick import Hands, Room, TickReport, tick_job
from scripts.webhook import Webhook

log = logging.getLogger("lorry.tick")


def open_rooms(environment: Mapping[str, str], root: str) -> list[Room]:
    """The store at `root` itself, then one room per client of the file LORRY_CLIENTS, where that is set.

    Raises InputError for a file or a secret that is missing.
    """
    path = environment.get("LORRY_CLIENTS")
    clients = load_clients(Path(path)) if path else {}
    return [Room(open_store(root)), *(client_room(client, environment, root) for client in clients.values())]


def client_room(client: Client, environment: Mapping[str, str], root: str) -> Room:
    """One client's jobs and ears. Its secrets come from the variables that the clients file names."""
    http = _http()
    webhook = rows = None
    if client.webhook is not None:
        webhook = Webhook(client.webhook.url, _secret(environment, client.webhook.secret_env, client), http)
    if client.supabase is not None:
        key = _secret(environment, client.supabase.key_env, client)
        rows = SupabaseRows(client.supabase.url, key, client.supabase.table, http)
    return Room(open_store(client_store(root, client.name)), Ears(webhook, rows))


def tick_of_door(environment: Mapping[str, str], root: str) -> Callable[[Client, str], None]:
    """What the front door calls for one job of a client when somebody asks for it. It raises InputError alone."""
    hands = open_hands(environment)

    def tick_one(client: Client, job_id: str) -> None:
        report = TickReport()
        tick_job(client_room(client, environment, root), job_id, hands, report)
        for trouble in report.troubles:
            log.warning("%s", trouble)

    return tick_one


def client_store(root: str, client: str) -> str:
    """The URL of a client's job folders."""
    return f"{root.rstrip('/')}/clients/{client}/jobs"


def client_notes(root: str, client: str) -> str:
    """The URL of what the front door notes about a client; its audit is there."""
    return f"{root.rstrip('/')}/clients/{client}/notes"


def is_within(root: str, store: str) -> bool:
    """Whether a store is the one at `root` or that of one of its clients."""
    below = re.escape(root.rstrip("/")) + rf"/clients/{CLIENT_NAME.pattern}/jobs"
    return store == root.rstrip("/") or re.fullmatch(below, store) is not None


def open_hands(environment: Mapping[str, str]) -> Hands:
    """Real backends, Runpod's bill where there is a key for it, and the clock of this machine."""
    known: dict[BackendName, Backend] = {}

    def backend(name: BackendName) -> Backend:
        return known.setdefault(name, open_backend(name, environment))

    return Hands(backend, open_bill(environment, backend))


def open_bill(environment: Mapping[str, str], backend: Callable[[BackendName], Backend]) -> Bill:
    """What each job's own provider says it did cost; nothing where it says nothing, or has no key here."""
    key, base = environment.get("RUNPOD_API_KEY"), environment.get("RUNPOD_API_BASE_URL") or BASE_URL

    def bill(store: Store, files: JobFiles) -> Charges | None:
        if files.submission is None:
            return None
        if files.submission.backend == "runpod_pod":
            return pod_bill(RunpodApi(key, base), store, files) if key else None
        rented = backend(files.submission.backend)
        return rented.charges(store, files) if isinstance(rented, KnowsCharges) else None

    return bill


@lru_cache(maxsize=1)
def _http() -> httpx.Client:
    """One pool of connections; it follows no redirect, so that nothing is sent where nobody configured it."""
    return httpx.Client(follow_redirects=False)


def _secret(environment: Mapping[str, str], name: str, client: Client) -> str:
    if not environment.get(name):
        raise InputError(Problem(name, f"not set, but client {client.name} needs it", "the secret that it stands for"))
    return environment[name]
