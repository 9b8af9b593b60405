"""Speed of the front door with a thousand jobs in its store: /run, /status, 200 status requests a second, memory.

python -m benchmarks.gateway          # a table; --json for machines; --seconds 5 for a quick look

The front door is a process of its own and is asked over HTTP from another. Machines are taken by a backend that answers
at once, so what is measured is ours. /run is given apart for a training set that is fetched and checked on the way
(the bicycle example, from this machine) and without the fetching. Processor time of the front door is given beside the
wall time, since that figure holds on a busy machine too.
"""

from __future__ import annotations

import argparse
import asyncio
import http.server
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "bicycle-care.jsonl"
KEY = "benchmark-key"
HEADERS = {"Authorization": f"Bearer {KEY}"}
JOBS = 1000
RATE = 200  # requests a second


def main() -> None:
    """Runs the benchmark and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long the steady stream of /status lasts")
    parser.add_argument("--serve", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(Path(arguments.serve))
    result = run(arguments.seconds)
    print(json.dumps(result, indent=2) if arguments.json else table(result))


def run(seconds: float = 30.0) -> dict[str, float]:
    """The figures: milliseconds at the median, requests a second, errors, memory in MiB before and after."""
    with tempfile.TemporaryDirectory(prefix="lorry-benchmark-") as name, sets() as url:
        folder = Path(name)
        fill(folder, JOBS)
        with front_door(folder) as (door, pid), httpx.Client(base_url=door, headers=HEADERS, timeout=60) as client:
            submitted(client, url, 0)  # what a process reads once is not counted
            began = cpu_seconds(pid)
            submits = [submitted(client, url, number) for number in range(1, 31)]
            run_cpu_ms = (cpu_seconds(pid) - began) / len(submits) * 1000
            status = [asked(client, f"job-{number % JOBS}") for number in range(JOBS)]
            before, began = resident_mib(pid), cpu_seconds(pid)
            steady = asyncio.run(stream(door, seconds))
            status_cpu_ms = (cpu_seconds(pid) - began) / round(RATE * seconds) * 1000
            after = resident_mib(pid)
        fetch_ms, check_ms = in_process(url)
    run_ms = statistics.median(submits)
    return {
        "gateway_run_ms": round(run_ms, 1),
        "gateway_run_without_fetch_ms": round(run_ms - fetch_ms, 1),
        "gateway_fetch_ms": round(fetch_ms, 1),
        "gateway_check_ms": round(check_ms, 1),
        "gateway_run_cpu_ms": round(run_cpu_ms, 1),
        "gateway_status_ms": round(statistics.median(status), 2),
        "gateway_status_cpu_ms": round(status_cpu_ms, 2),
        **steady,
        "gateway_memory_before_mib": before,
        "gateway_memory_after_mib": after,
    }


def table(result: dict[str, float]) -> str:
    """The figures in plain words."""
    return "\n".join(f"{name.removeprefix('gateway_'):<24} {value:g}" for name, value in result.items())


def submitted(client: httpx.Client, url: str, number: int) -> float:
    """Milliseconds of one /run."""
    value = {"job_id": f"new-{number}", "dataset_url": f"{url}/set.jsonl", "hyperparameters": {"epochs": 2}}
    began = time.perf_counter()
    answer = client.post("/v2/lorry/run", json={"input": value})
    spent = time.perf_counter() - began
    assert answer.status_code == 200, answer.text
    return spent * 1000


def asked(client: httpx.Client, job: str) -> float:
    """Milliseconds of one /status."""
    began = time.perf_counter()
    answer = client.get(f"/v2/lorry/status/{job}")
    assert answer.status_code == 200, answer.text
    return (time.perf_counter() - began) * 1000


async def stream(door: str, seconds: float) -> dict[str, float]:
    """RATE requests a second, each at its time whether or not the earlier ones are answered."""
    spent: list[float] = []
    errors = 0
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(headers=HEADERS, timeout=30, limits=limits) as client:

        async def one(number: int) -> None:
            nonlocal errors
            began = time.perf_counter()
            try:
                answer = await client.get(f"{door}/v2/lorry/status/job-{number % JOBS}")
                errors += answer.status_code != 200
            except httpx.HTTPError:
                errors += 1
            spent.append((time.perf_counter() - began) * 1000)

        began, tasks = time.perf_counter(), []
        for number in range(round(RATE * seconds)):
            await asyncio.sleep(max(0.0, began + number / RATE - time.perf_counter()))
            tasks.append(asyncio.create_task(one(number)))
        await asyncio.gather(*tasks)
        took = time.perf_counter() - began
    spent.sort()
    return {
        "gateway_stream_seconds": round(took, 1),
        "gateway_stream_per_second": round(len(spent) / took, 1),
        "gateway_stream_errors": errors,
        "gateway_stream_median_ms": round(statistics.median(spent), 2),
        "gateway_stream_p99_ms": round(spent[int(len(spent) * 0.99)], 1),
    }


def in_process(url: str) -> tuple[float, float]:
    """What fetching and checking the training set take by themselves, in milliseconds."""
    from recipes.load import load_recipe
    from scripts.gateway.dataset import Fetcher, fetch
    from scripts.tokenizer import find_tokenizer
    from scripts.training_set import prepare

    recipe = load_recipe("smoke/zero3").recipe
    tokenizer = find_tokenizer(recipe.base.id, ())
    fetched, checked = [], []
    for _ in range(10):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "set.jsonl"
            at = time.perf_counter()
            fetch(f"{url}/set.jsonl", path, Fetcher(allows_loopback=True))
            fetched.append(time.perf_counter() - at)
            at = time.perf_counter()
            prepare(path, Path(folder) / "out", recipe.data, 1, tokenizer)
            checked.append(time.perf_counter() - at)
    return statistics.median(fetched) * 1000, statistics.median(checked) * 1000


def fill(folder: Path, jobs: int) -> None:
    """A store with that many jobs of one client: every third runs, every third ended well, every third failed."""
    from recipes.catalog import load_catalog
    from recipes.load import load_recipe
    from scripts.gateway.records import Request, Understood, as_bytes
    from scripts.plan import make_plan
    from scripts.render import render
    from scripts.store import open_store

    store = open_store(f"{folder.as_uri()}/clients/acme/jobs")
    catalog = load_catalog()
    loaded = load_recipe("smoke/zero3", catalog)
    plan = make_plan(loaded, None, catalog)
    understood = Understood(
        recipe="smoke/zero3", base_model="lorry/smoke", epochs=4, learning_rate=5e-3, batch_size=4, rank=8, alpha=16
    )
    now = time.time()
    for number in range(jobs):
        job = f"job-{number}"
        spec = render(loaded, plan, None, catalog, job_id=job, backend="local", store=store.url, commit=None)
        request = Request(client="acme", job_id=job, body_sha256="0" * 64, received_at=now, understood=understood)
        ended = {0: None, 1: "completed", 2: "failed"}[number % 3]
        container = {
            "job_id": job, "stage": "done" if ended else "training", "updated_at": now + 3600, "started_at": now,
            "pid": 1, "ended": "failed" if ended == "completed" else ended, "sentence": "as told",
        }  # fmt: skip
        status = {"job_id": job, "stage": "training", "attempt": 1, "updated_at": now, "step": 3, "total_steps": 9,
                  "training_loss": 2.0, "learning_rate": 1e-4}  # fmt: skip
        handle = {"job_id": job, "backend": "local", "request_sha256": "", "submitted_at": now, "handle": {"id": job}}
        path = folder / "clients" / "acme" / "jobs" / job
        path.mkdir(parents=True)
        path.joinpath("request.json").write_bytes(as_bytes(request))
        path.joinpath("launch.json").write_bytes(as_bytes(spec))
        for name, value in (("container", container), ("status", status), ("submission", handle)):
            path.joinpath(f"{name}.json").write_text(json.dumps(value))


def serve(folder: Path) -> None:
    """The front door of the benchmark, in a process of its own; prints its port."""
    import hashlib
    import socket

    import uvicorn

    from scripts.gateway.app import create_app
    from scripts.gateway.clients import Client
    from scripts.gateway.settings import GatewaySettings

    digest = hashlib.sha256(KEY.encode()).hexdigest()
    clients = {"acme": Client(name="acme", key_sha256=(digest,), recipe="smoke/zero3")}
    settings = GatewaySettings(folder.as_uri(), (), "benchmark-secret", allows_loopback=True)
    app = create_app(settings, clients, open_backend=lambda name, environment: AtOnce())
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False)).run(sockets=[listener])


class AtOnce:
    """A backend whose machines are there as soon as they are asked for, and cost nothing."""

    name = "local"

    def request(self, spec: Any) -> dict[str, Any]:
        return {"name": spec.job_id}

    def submit(self, spec: Any, request: Mapping[str, Any]) -> dict[str, Any]:
        return {"id": spec.job_id}

    def observe(self, handle: Mapping[str, Any]) -> Any:
        from scripts.backends.base import Observation

        return Observation("running")

    def stop(self, handle: Mapping[str, Any]) -> None:
        return

    def owned(self) -> list[Any]:
        return []


@contextmanager
def front_door(folder: Path) -> Iterator[tuple[str, int]]:
    """(URL, process number) of the front door."""
    command = [sys.executable, "-m", "benchmarks.gateway", "--serve", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = f"http://127.0.0.1:{int(server.stdout.readline())}"
            give_up = time.monotonic() + 30
            while time.monotonic() < give_up:
                try:
                    httpx.get(f"{url}/healthz")
                    break
                except httpx.ConnectError:
                    time.sleep(0.05)
            yield url, server.pid
        finally:
            server.terminate()


@contextmanager
def sets() -> Iterator[str]:
    """A server of the example training set."""
    data = EXAMPLE.read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *words: Any) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def cpu_seconds(pid: int) -> float:
    """What a process has used of the processors so far: a figure that other processes hardly change."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mib(pid: int) -> int:
    """Memory of a process, in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) // 1024
    return 0


if __name__ == "__main__":
    main()
