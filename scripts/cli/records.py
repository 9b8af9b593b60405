"""Commands about the record of what was done, and about the end of a client."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from scripts.cli.command import Command, actor, add_json, print_record
from scripts.settings import Settings


def _audit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("verb", nargs="?", choices=["show", "verify"], default="show", help="default: show")
    parser.add_argument("--client", metavar="NAME", help="the chain of one client of the front door")
    parser.add_argument("--head", metavar="NUMBER:SHA256", help="a head kept elsewhere, which must be in the chain")
    add_json(parser)


def _audit(arguments: argparse.Namespace, settings: Settings) -> int:
    """Both verbs verify; exit code 7 where the chain is broken."""
    from scripts.audit import verify
    from scripts.rooms import client_notes
    from scripts.store import open_store

    url = client_notes(settings.store, arguments.client) if arguments.client else settings.store
    chain = verify(open_store(url), arguments.head)
    if arguments.json:
        print(json.dumps({"head": str(chain.head), "entries": [e.model_dump() for e in chain.entries]}, indent=2))
        return 0
    if arguments.verb == "show":
        for entry in chain.entries:
            at = datetime.fromtimestamp(entry.at, UTC).strftime("%Y-%m-%d %H:%M:%S")
            print(f"{entry.number:>5}  {at}  {entry.who:<16} {entry.what:<10} {entry.subject}  {entry.note}".rstrip())
    print(f"{len(chain.entries)} entries, the chain is whole; head {chain.head}")
    return 0


def _delete_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("client", metavar="NAME", help="a client of the front door")
    also = "another store that holds clients/NAME, such as a volume: s3://VOLUME-ID/adapters; may be given again"
    parser.add_argument("--also", metavar="URL", action="append", default=[], help=also)
    parser.add_argument("--yes", action="store_true", help="do it (default: say what would go; at a terminal, ask)")
    add_json(parser)


def _delete(arguments: argparse.Namespace, settings: Settings) -> int:
    from scripts.cli.look_after_it import state_of
    from scripts.delete_client import delete_client, survey
    from scripts.serving.connect import connect
    from scripts.store import open_store

    now, name = time.time(), arguments.client
    asked = survey(settings.store, name, arguments.also, known=_is_known(name), state=lambda f: state_of(f, now))
    if not (arguments.yes or _typed(asked.client)):
        places = {url: len(found) for url, found in asked.places}
        if arguments.json:
            print(json.dumps({"client": name, "deleted": False, "jobs": asked.jobs, "would_delete": places}, indent=2))
        else:
            for url, count in places.items():
                print(f"{url}: {count} objects, old versions included")
            for server in asked.there.servers:
                print(f"{server.url}: its adapters would be unloaded")
            print(f"nothing was deleted; `lorry delete-client {name} --yes` deletes it for good")
        return 0
    store, who = open_store(settings.store), actor(os.environ)
    to_server = partial(connect, store=store, environment=os.environ, by=who, now=time.time, sleep=time.sleep)
    certificate = delete_client(asked, to_server, who=who, now=now)
    if arguments.json:
        print_record(certificate)
    else:
        for place in certificate.places:
            print(f"{place.url}: {place.removed} objects deleted, {place.bytes} bytes")
        for left in certificate.servers:
            print(f"{left.url}: {left.unloaded} adapters unloaded; {left.sentence}")
        print(f"certificate {settings.store}/_certificates/{name}-{int(now)}.json")
        print("not covered: " + "; ".join(certificate.not_covered))
    return 0


def _typed(client: str) -> bool:
    """Whether a person at a terminal types the client's name."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    return input(f"Type {client} to delete all of it for good: ").strip() == client


def _is_known(client: str) -> bool:
    from scripts.gateway.clients import load_clients

    path = os.environ.get("LORRY_CLIENTS")
    return bool(path) and client in load_clients(Path(str(path)))


COMMANDS = (
    Command("audit", "show who did what, and verify that nobody changed the record", _audit_arguments, _audit),
    Command("delete-client", "delete all of a client for good, with a certificate", _delete_arguments, _delete),
)
