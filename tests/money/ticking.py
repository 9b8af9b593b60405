"""A tick in a process of its own, at a given moment; it may kill itself just before or just after a webhook is sent.

python -m tests.money.ticking STORE URL NOW before|after|never      # URL of the client's webhook
python -m tests.money.ticking STORE URL NOW supabase                # URL of the client's database
"""

from __future__ import annotations

import os
import signal
import sys

import httpx

from recipes.recipe import BackendName
from scripts.backends.base import Backend
from scripts.ears import Ears
from scripts.store import open_store
from scripts.supabase import SupabaseRows
from scripts.tick import Hands, Room, tick
from scripts.webhook import Webhook


class Killer(httpx.HTTPTransport):
    """Kills this process at a moment of the first request."""

    def __init__(self, moment: str) -> None:
        super().__init__()
        self._moment = moment

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if self._moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        response = super().handle_request(request)
        if self._moment == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return response


def main(store: str, url: str, now: str, what: str) -> int:
    http = httpx.Client(transport=Killer(what))
    if what == "supabase":
        ears = Ears(rows=SupabaseRows(url, "service-role-key", "pipeline_training_jobs", http))
    else:
        ears = Ears(Webhook(url, "a-signing-secret", http))
    report = tick([Room(open_store(store), ears)], Hands(_no_backend, lambda store, files: None, lambda: float(now)))
    return len(report.troubles)


def _no_backend(name: BackendName) -> Backend:
    raise AssertionError(f"a job without a machine needs no {name}")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
