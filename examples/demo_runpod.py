"""The web app's whole way on Runpod, without an account: `make demo-runpod`.

A local Runpod, a bucket and the front door are opened on this machine. A client submits a training set by HTTP, the
front door rents a Pod for it, the Pod trains and ends itself, the client downloads the adapter and checks it. It exits
with 0 when the adapter is whole, the bill is paid by the quote and no Pod is left, with 1 when any of that is not so,
with 130 after Ctrl-C. Whatever happens, nothing it started is left.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

from scripts.adapter import verify_adapter
from scripts.backends.runpod_api import RunpodApi
from scripts.container.nodes import free_port
from scripts.container.supervisor import start_child
from scripts.errors import LorryError
from scripts.fake_runpod.host import Host
from scripts.fake_runpod.processes import ProcessRunner
from scripts.fake_runpod.server import serve
from scripts.fake_runpod.store import serve_store

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "demo-runpod"
IMAGE = "localhost/lorry/trainer@sha256:" + "0" * 64  # the local Runpod runs this installation instead
START_SECONDS, TRAIN_SECONDS, END_SECONDS = 60.0, 600.0, 120.0
CENT = 0.01
CLIENT = "demo"

# What the Pod's session may reach: infra/modules/artifact-store gives this document for a real bucket.
SESSION_POLICY = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "arn:aws:s3:::lorry/JOB_PREFIX/*"}],
}


class Broken(Exception):
    """What the demo promises and did not keep, as one sentence."""


@dataclass(frozen=True)
class Rooms:
    """What is open: the front door and its client's key, the provider's account, and the operator's environment."""

    door: str
    key: str
    training_set: str
    runpod: RunpodApi
    environment: Mapping[str, str]


def main() -> int:
    """Goes the whole way; returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="lorry-demo-") as folder, open_rooms(Path(folder)) as rooms:
            client_way(rooms)
    except KeyboardInterrupt:
        say("stopped", "everything this demo started is gone")
        return 130
    except (Broken, LorryError, httpx.HTTPError) as error:
        say("failed", str(error))
        return 1
    say("done", "nothing is left running, nothing is left to pay")
    return 0


def client_way(rooms: Rooms) -> None:
    """What a web app does, and then what its operator sees. Raises Broken."""
    web = httpx.Client(base_url=rooms.door, headers={"Authorization": f"Bearer {rooms.key}"}, timeout=60.0)
    job_id = f"bicycle-care-{secrets.token_hex(3)}"
    job = {"job_id": job_id, "dataset_url": rooms.training_set, "hyperparameters": {"epochs": 2}}
    sent = answer(web.post("/v2/lorry/run", json={"input": job}))
    say("submit", f"{sent['id']}: {sent['understood']['base_model']} on {sent['understood']['gpu']}")
    say("quote", f"${sent['quote_usd']:.2f} expected at most, ended at ${sent['cap_usd']:.2f} whatever happens")
    status = follow(web, job_id)
    folder = download(web, status["output"]["model_files"], OUT / job_id)
    manifest = verify_adapter(folder)
    say("verify", f"{len(manifest.files)} files are what the manifest says; effect {manifest.effect:.3g}")
    until(lambda: not rooms.runpod.listed("pods"), END_SECONDS, "a Pod is left running")
    say("pod", "it ended itself; none is left")
    say("bill", f"${paid(rooms, job_id):.4f}, as Runpod charged it; the quote was ${sent['quote_usd']:.2f}")
    say("adapter", str(folder))


def follow(web: httpx.Client, job_id: str) -> dict[str, Any]:
    """The status of the job once it is COMPLETED; what changes on the way is said. Raises Broken."""
    said = ""
    give_up = time.monotonic() + TRAIN_SECONDS
    while time.monotonic() < give_up:
        status = answer(web.get(f"/v2/lorry/status/{job_id}"))
        if status["status"] == "COMPLETED":
            return status
        if status["status"] not in ("IN_QUEUE", "IN_PROGRESS"):
            raise Broken(f"the job is {status['status']}: {status.get('error')}")
        seen = status.get("output") or {"message": "it waits for its Pod", "progress": 0}
        if seen["message"] != said:
            said = seen["message"]
            say("status", f"{status['status']} {seen['progress']:3d} %  {said}")
        time.sleep(0.5)
    raise Broken(f"the job has not ended after {TRAIN_SECONDS:.0f} s")


def download(web: httpx.Client, links: Mapping[str, str], folder: Path) -> Path:
    """The folder with the files behind the links, which need no key."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, link in links.items():
        reply = httpx.get(link, timeout=60.0)
        if not reply.is_success:
            raise Broken(f"the link to {name} gives {reply.status_code}")
        (folder / Path(name).name).write_bytes(reply.content)
    say("download", ", ".join(sorted(links)))
    return folder


def paid(rooms: Rooms, job_id: str) -> float:
    """USD that Runpod charged, as `lorry cost` settles the job by it. Raises Broken where they differ."""
    command = [sys.executable, "-m", "scripts.cli", "cost", job_id, "--client", CLIENT, "--json"]
    done = subprocess.run(command, env=dict(rooms.environment), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise Broken(f"lorry cost: {done.stderr.strip()}")
    cost = json.loads(done.stdout)
    settled = cost["settlement"] or {"source": None, "usd": 0.0}
    charged = sum(float(row["totalAmount"]) for row in rooms.runpod.ask("GET", "/billing/pods")["records"])
    if settled["source"] != "bill" or abs(settled["usd"] - charged) > CENT:
        raise Broken(f"lorry cost says {settled}, Runpod charged ${charged:.4f}")
    if not 0 < charged <= cost["quote_usd"]:
        raise Broken(f"Runpod charged ${charged:.4f}, the quote was ${cost['quote_usd']:.2f}")
    return charged


@contextmanager
def open_rooms(folder: Path) -> Iterator[Rooms]:
    """Opens everything on this machine, and closes it whatever happens."""
    account_key, client_key = f"local_{secrets.token_hex(8)}", secrets.token_urlsafe(24)
    host = Host(folder / "pods", ProcessRunner(), "", 1.0, 1.0)
    with (
        serve_store("lorry", limited=False) as bucket,
        serve(account_key, host=host) as runpod,
        served(ROOT / "examples") as files,
        RunpodApi(account_key, runpod.url) as api,
    ):
        say("runpod", f"a local Runpod at {runpod.url}, a bucket at {bucket}")
        (folder / "clients.yaml").write_text(clients_file(client_key))
        environment = operator_environment(folder) | {
            "RUNPOD_API_BASE_URL": runpod.url,
            "RUNPOD_API_KEY": account_key,
            "AWS_ENDPOINT_URL": bucket,
        }
        with front_door(environment, folder / "gateway.log") as door:
            say("door", f"the front door is {door}/v2/lorry")
            environment["LORRY_PUBLIC_URL"] = door
            yield Rooms(door, client_key, f"{files}/bicycle-care.jsonl", api, environment)


def operator_environment(folder: Path) -> dict[str, str]:
    """What the operator of a front door sets, with nothing of the shell this runs in but where programs are."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ}
    return kept | {
        "HOME": str(folder),
        "PYTHONPATH": str(ROOT),
        "LORRY_STORE": "s3://lorry/work",
        "LORRY_CLIENTS": str(folder / "clients.yaml"),
        "LORRY_IMAGE": IMAGE,
        "LORRY_TOKEN_SECRET": secrets.token_hex(16),
        "LORRY_TRAINER_ROLE": "arn:aws:iam::123456789012:role/trainer",
        "LORRY_SESSION_POLICY": json.dumps(SESSION_POLICY),
        "LORRY_ALLOW_LOOPBACK": "yes",  # the training set comes from this machine
        "AWS_ACCESS_KEY_ID": "local",
        "AWS_SECRET_ACCESS_KEY": "local",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def clients_file(key: str) -> str:
    """One client of the front door, known by the hash of its key."""
    digest = hashlib.sha256(key.encode()).hexdigest()
    return f"{CLIENT}:\n  key_sha256: [{digest}]\n  recipe: smoke/pod\n  max_usd_per_job: 1\n"


@contextmanager
def front_door(environment: Mapping[str, str], log: Path) -> Iterator[str]:
    """The URL of `lorry gateway` in a process of its own."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "scripts.cli", "gateway", "--port", str(port)]
    child = start_child(command, {**environment, "LORRY_PUBLIC_URL": url}, log, log.parent)
    try:
        until(lambda: is_up(url, child, log), START_SECONDS, "the front door does not open")
        yield url
    finally:
        child.terminate()
        try:
            child.wait(10.0)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def is_up(url: str, child: subprocess.Popen[bytes], log: Path) -> bool:
    """Whether the front door answers. Raises Broken when its process has ended."""
    if child.poll() is not None:
        raise Broken(f"the front door ended: {log.read_text(errors='replace')[-2000:]}")
    try:
        return httpx.get(f"{url}/healthz", timeout=5.0).is_success
    except httpx.HTTPError:
        return False


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The URL of a web server that gives out the files of a folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Quiet(SimpleHTTPRequestHandler):
    """Gives out files and writes no log."""

    def log_message(self, format: str, *args: object) -> None:
        return


def answer(reply: httpx.Response) -> dict[str, Any]:
    """The JSON object of an answer. Raises Broken with the front door's own sentence."""
    value: dict[str, Any] = reply.json()
    if not reply.is_success:
        raise Broken(f"{reply.request.method} {reply.request.url.path}: {reply.status_code} {value.get('error')}")
    return value


def until(is_so: Callable[[], bool], seconds: float, otherwise: str) -> None:
    """Waits for something. Raises Broken with a sentence when it does not come."""
    give_up = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > give_up:
            raise Broken(f"{otherwise} after {seconds:.0f} s")
        time.sleep(0.2)


def say(stage: str, sentence: str) -> None:
    """One line of progress."""
    print(f"{stage:<10} {sentence}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
