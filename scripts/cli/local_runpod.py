"""The command that lets people try Runpod without an account: Pods and queue workers are processes of this machine."""

from __future__ import annotations

import argparse
import json
import secrets
import shlex
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripts.cli.command import Command, add_json
from scripts.settings import Settings

IMAGE = "localhost/lorry/trainer@sha256:" + "0" * 64
"Stands for an image: the local Runpod runs this installation."
_BUCKET = "lorry"
_QUEUE_RECIPE = "smoke/queue"
_KEYS = {"AWS_ACCESS_KEY_ID": "lorry_store_key_id", "AWS_SECRET_ACCESS_KEY": "lorry_store_key"}
_NO_STORE = "there is no bucket here, since moto is not installed: set LORRY_STORE to an s3:// store of yours"


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=0, help="port to listen on (default: a free one)")
    parser.add_argument("--folder", type=Path, help="where the machines' disks are (default: a temporary folder)")
    add_json(parser)


def _fake_runpod(arguments: argparse.Namespace, settings: Settings) -> int:
    from scripts.fake_runpod.endpoints import create_endpoint
    from scripts.fake_runpod.host import Host
    from scripts.fake_runpod.processes import ProcessRunner
    from scripts.fake_runpod.server import serve

    key = f"local_{secrets.token_hex(8)}"
    with tempfile.TemporaryDirectory(prefix="lorry-runpod-") as temporary, _store() as store_url:
        host = Host((arguments.folder or Path(temporary)).resolve(), ProcessRunner(), "", 2.0, 2.0)
        with serve(key, port=arguments.port, host=host) as runpod:
            for name in _KEYS.values() if store_url else ():
                secret = {"name": name, "value": "local"}
                with runpod.lock:
                    runpod.account.add_secret(secret)
            values = _environment(runpod.url, key, store_url)
            with runpod.lock:
                endpoint = create_endpoint(runpod.account, _endpoint(values), runpod.account.clock.stamp())
            _tell(values | {"RUNPOD_TRAINING_ENDPOINT_ID": endpoint["id"]}, as_json=arguments.json)
            _until_told()
    print("the local Runpod is gone, and its Pods and its bucket with it", file=sys.stderr)
    return 0


def _until_told() -> None:
    """Waits for Ctrl-C or SIGTERM."""
    told = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: told.set())
    told.wait()


@contextmanager
def _store() -> Iterator[str | None]:
    """The URL of a bucket's server, None where there is none."""
    try:
        import moto.server  # noqa: F401
    except ImportError:
        yield None
        return
    from scripts.fake_runpod.store import serve_store

    with serve_store(_BUCKET) as url:
        yield url


def _environment(url: str, key: str, store_url: str | None) -> dict[str, str]:
    """What a shell must know to use it."""
    values = {"RUNPOD_API_BASE_URL": url, "RUNPOD_API_KEY": key, "LORRY_IMAGE": IMAGE}
    if store_url is None:
        return values
    named = ",".join(f"{variable}={secret}" for variable, secret in _KEYS.items())
    values |= {"LORRY_STORE": f"s3://{_BUCKET}/jobs", "LORRY_POD_SECRETS": named, "AWS_ENDPOINT_URL": store_url}
    return values | {"AWS_DEFAULT_REGION": "us-east-1"} | dict.fromkeys(_KEYS, "local")


def _endpoint(values: dict[str, str]) -> dict[str, Any]:
    """A queue whose workers find the bucket, as infra/modules/runpod-training-endpoint makes one."""
    passed_on = ("LORRY_STORE", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION")
    env = {name: values[name] for name in passed_on if name in values} | {"LORRY_RECIPE": _QUEUE_RECIPE}
    if "LORRY_STORE" in values:
        env |= {variable: f"{{{{ RUNPOD_SECRET_{secret} }}}}" for variable, secret in _KEYS.items()}
    return {
        "name": "lorry-local-training",
        "type": "QUEUE",
        "scaling": {"type": "REQUEST_COUNT", "requestCount": 1},
        "gpu": {"pools": ["ADA_48_PRO"], "count": 1},
        "workers": {"min": 0, "max": 1},
        "timeout": 3_600_000,
        "image": IMAGE,
        "env": env,
    }


def _tell(values: dict[str, str], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(values), flush=True)
        return
    print("# A Runpod on this machine. Nothing is rented and nothing is charged. Ctrl-C ends it.")
    print("# Paste this into another shell:")
    for name, value in values.items():
        print(f"export {name}={shlex.quote(value)}")
    if "LORRY_STORE" not in values:
        print(f"# {_NO_STORE}")
    sys.stdout.flush()


COMMANDS = (
    Command(
        "fake-runpod", "try Pods and the queue without an account: a Runpod on this machine", _arguments, _fake_runpod
    ),
)
