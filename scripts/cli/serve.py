"""The command that puts an adapter live on a server of the private model, and the one that opens a server here."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.recipe import Base, Recipe
from scripts.cli.command import Command, actor, add_json, print_record
from scripts.errors import InputError, NotFound, Problem
from scripts.settings import Settings

if TYPE_CHECKING:
    from recipes.serving import Place, Serving
    from scripts.store import Store

PORT = 8800


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB", nargs="?", help="publish the adapter of this job")
    parser.add_argument("--place", metavar="NAME", default="main", help="which server, by a name you choose (main)")
    parser.add_argument("--roll-back", action="store_true", help="make the adapter live that was live before")
    parser.add_argument(
        "--check",
        action="store_true",
        help="hear the live adapter and canary, and how users' chats end; load again, or go back",
    )
    parser.add_argument("--history", action="store_true", help="show what was done at this place")
    parser.add_argument("--local", metavar="MODEL", help=f"open a server of this base model here, on port {PORT}")
    parser.add_argument("--port", type=int, default=PORT, help="of the server opened with --local")
    first = "with the first JOB: "
    parser.add_argument("--at", metavar="URL", help=first + "the server, such as https://host or http://127.0.0.1:8800")
    parser.add_argument("--endpoint", metavar="ID", help=first + "a Runpod serverless endpoint; it has its own URL")
    parser.add_argument("--adapters", metavar="URL", help=first + "the folder its adapters are copied to")
    parser.add_argument("--mounted", metavar="PATH", help=first + "that folder as the server sees it")
    layouts = "how it reads adapters (vllm); shared: started with --enable-moe-shared-loras"
    parser.add_argument("--form", choices=["vllm", "shared", "peft"], help=first + layouts)
    parser.add_argument("--max-lora-rank", type=int, metavar="N", help=first + "as the server was started (16)")
    parser.add_argument("--expert-gib", type=float, metavar="GIB", help=first + "GPU memory left for LoRA of experts")
    parser.add_argument("--canary", type=float, metavar="PERCENT", help="prove it, but for a share of users alone")
    parser.add_argument("--override", metavar="REASON", help="publish without a passing evaluation; it is recorded")
    add_json(parser)


def _serve(arguments: argparse.Namespace, settings: Settings) -> int:
    chosen = [bool(arguments.job), arguments.roll_back, arguments.check, arguments.history, bool(arguments.local)]
    if sum(chosen) != 1:
        raise InputError(Problem("serve", "one thing at a time", "JOB, --roll-back, --check, --history or --local"))
    if arguments.canary is not None and not 0 < arguments.canary < 100:
        raise InputError(Problem("--canary", f"{arguments.canary:g}", "percent: more than 0 and less than 100"))
    if arguments.local:
        return _local(arguments, settings)
    return _history(arguments, settings) if arguments.history else _act(arguments, settings)


def _act(arguments: argparse.Namespace, settings: Settings) -> int:
    from scripts.serving.connect import connect
    from scripts.serving.history import history
    from scripts.serving.publish import Desk, check, publish, roll_back
    from scripts.store import open_store

    store = open_store(settings.store)
    states = history(store, arguments.place)
    place = _place(arguments, store, states[-1].place if states else None)
    who = actor(os.environ)
    with connect(place, store, os.environ, who, time.time, time.sleep) as vllm:
        desk = Desk(store, arguments.place, vllm, os.environ, who, time.time, time.sleep)
        if arguments.job:
            share = None if arguments.canary is None else arguments.canary / 100
            state = publish(desk, arguments.job, place, override=arguments.override, canary=share)
        else:
            state = roll_back(desk) if arguments.roll_back else check(desk)
    if arguments.json:
        print_record(state)
    else:
        print(_told(state))
    return 0


def _place(arguments: argparse.Namespace, store: Store, known: Place | None) -> Place:
    """The place as recorded, with what was given now. Raises InputError when something is missing."""
    from recipes.serving import Place
    from scripts.job_folder import read_job
    from scripts.serving.runpod_endpoint import openai_url

    values = known.model_dump() if known else {}
    if arguments.at or arguments.endpoint:
        values["base_sha256"] = None  # another server, or a new revision of its base
    given = {
        "url": "at",
        "adapters": "adapters",
        "mounted": "mounted",
        "form": "form",
        "max_lora_rank": "max_lora_rank",
        "endpoint": "endpoint",
        "expert_gib": "expert_gib",
    }
    values |= {name: value for name, flag in given.items() if (value := getattr(arguments, flag)) is not None}
    if known is None:
        if not arguments.job:
            raise NotFound(Problem(f"place {arguments.place}", "nothing was ever published there", "lorry serve JOB"))
        launch = read_job(store, arguments.job).launch
        if launch is None:
            raise NotFound(Problem(f"job {arguments.job}", f"no such job in {store.url}", "see `lorry jobs`"))
        values["base"] = launch.recipe.base.id
    if arguments.endpoint and not arguments.at:
        values["url"] = openai_url(arguments.endpoint)
    if values.get("endpoint"):
        values.setdefault("mounted", "/runpod-volume/adapters")
    if "adapters" in values and str(values["adapters"]).startswith("file://"):
        values.setdefault("mounted", str(values["adapters"]).removeprefix("file://"))
    missing = [
        f"--{flag}" for name, flag in given.items() if name in ("url", "adapters", "mounted") and name not in values
    ]
    if missing:
        raise InputError(*(Problem(flag, "missing", "needed with the first adapter of a place") for flag in missing))
    return Place.model_validate(values)


def _history(arguments: argparse.Namespace, settings: Settings) -> int:
    from scripts.serving.history import history
    from scripts.store import open_store

    states = history(open_store(settings.store), arguments.place)
    if arguments.json:
        print(json.dumps([state.model_dump() for state in states], indent=2))
    else:
        for state in states:
            print(_told(state))
    return 0


def _told(state: Serving) -> str:
    canary = f", {state.canary} for {state.canary_share:.0%}" if state.canary else ""
    said = f" ({state.sentence})" if state.sentence else ""
    return f"{state.deed} {state.job_id}: {state.outcome}{said}; live: {state.live or 'the base model'}{canary}"


def _local(arguments: argparse.Namespace, settings: Settings) -> int:
    try:
        import uvicorn

        from scripts.serving.local_server import create_server
    except ImportError:
        raise InputError(Problem("serve", "starlette is not installed", "pip install 'lorry[gateway]'")) from None
    from scripts.machine import trainer_environment
    from scripts.models import making_commands, model_folder, model_problem
    from scripts.serving.worker import Worker, answer_command

    settings.models.mkdir(parents=True, exist_ok=True)
    for command in making_commands(settings.models, Recipe(base=Base(id=arguments.local))):
        subprocess.run(command, check=True, capture_output=True)
    folder = model_folder(settings.models, arguments.local)
    if problem := model_problem(folder):
        raise NotFound(Problem("--local", problem, "a base model that is staged on this machine"))
    on_cpu = not Path("/dev/nvidiactl").exists()
    worker = Worker(answer_command(folder), trainer_environment(os.environ, on_cpu))
    url = f"http://127.0.0.1:{arguments.port}"
    print(json.dumps({"url": url}) if arguments.json else f"{arguments.local} answers at {url}/v1", flush=True)
    try:
        uvicorn.run(create_server(worker, arguments.local), host="127.0.0.1", port=arguments.port, log_level="warning")
    finally:
        worker.close()
    print("the server is closed", file=sys.stderr)
    return 0


COMMANDS = (Command("serve", "put an adapter live and prove it there; go back; serve here", _arguments, _serve),)
