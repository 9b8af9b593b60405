"""The command that opens the front door: it reads the environment once and serves until it is told to stop."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.cli.command import Command
from scripts.errors import InputError, Problem
from scripts.settings import Settings

if TYPE_CHECKING:
    from scripts.gateway.clients import Client

PORT = 8700


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, help=f"port to listen on (default: what PORT says, else {PORT})")
    parser.add_argument("--clients", type=Path, metavar="FILE", help="the clients (default: what LORRY_CLIENTS names)")
    parser.add_argument("--json", action="store_true", help="print where it listens as JSON")


def _gateway(arguments: argparse.Namespace, settings: Settings) -> int:
    try:
        import uvicorn

        from scripts.gateway.app import create_app
    except ImportError:
        want = "pip install 'lorry[gateway]'"
        raise InputError(Problem("gateway", "starlette and uvicorn are not installed", want)) from None
    from scripts.gateway.clients import load_clients
    from scripts.gateway.settings import read_gateway_settings

    path = arguments.clients or os.environ.get("LORRY_CLIENTS")
    if not path:
        raise InputError(Problem("LORRY_CLIENTS", "missing", "the path of the clients' YAML file"))
    chosen = read_gateway_settings(os.environ, Path.cwd())
    port = arguments.port or port_of(os.environ)
    app = create_app(chosen, load_clients(Path(path)), tick=tick_of(chosen.store))
    place = f"http://{arguments.host}:{port}/v2/lorry"
    print(f'{{"url": "{place}"}}' if arguments.json else f"the front door is {place}", flush=True)
    # The access log would hold signed links, which are keys for an hour.
    uvicorn.run(app, host=arguments.host, port=port, access_log=False, log_level="warning", server_header=False)
    print("the front door is closed; jobs go on without it", file=sys.stderr)
    return 0


def port_of(environment: Mapping[str, str]) -> int:
    """The port that a container host names in PORT, else our own. Raises InputError."""
    text = environment.get("PORT") or str(PORT)
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise InputError(Problem("PORT", repr(text), "a number from 1 to 65535"))
    return int(text)


def tick_of(store: str) -> Callable[[Client, str], None]:
    """What is due for one job, with the backends and the bill of this environment."""
    from scripts.rooms import client_room, open_hands
    from scripts.tick import TickReport, tick_job

    hands = open_hands(os.environ)

    def tick(client: Client, job_id: str) -> None:
        report = TickReport()
        tick_job(client_room(client, os.environ, store), job_id, hands, report)
        for trouble in report.troubles:
            print(f"tick: {trouble}", file=sys.stderr)

    return tick


COMMANDS = (Command("gateway", "open the front door: one URL and one key for a web app", _arguments, _gateway),)
