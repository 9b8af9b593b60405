"""From a training set to an adapter that answers, and back to the one before, without a GPU: `make demo-serve`.

Two adapters are trained, evaluated and published to a server on this machine; each is proven there by what it says.
Then the first is live again. It exits with 0 when all of that is so, with 1 when not; nothing it started is left.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from scripts.container.nodes import free_port

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "demo-serve"
SET = ROOT / "examples" / "bicycle-care.jsonl"
BASE = "lorry/smoke"
QUESTION = [{"role": "user", "content": "My chain squeaks when I pedal."}]
START_SECONDS = 180.0


class Broken(Exception):
    """What the demo promises and did not keep, as one sentence."""


def lorry(*words: str) -> str:
    """One command as a person types it, shown; what it printed. Raises Broken with its own words."""
    print(f"$ lorry {' '.join(words)}", flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LORRY_STORE": (OUT / "jobs").as_uri()}
    command = [sys.executable, "-m", "scripts.cli", *words]
    done = subprocess.run(command, cwd=OUT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise Broken(f"lorry {words[0]} ended with {done.returncode}: {done.stdout.strip()[-500:]}")
    print(done.stdout, flush=True)
    return done.stdout


@contextmanager
def server() -> Iterator[str]:
    """The URL of the server of the base model, for as long as the block lasts."""
    port = free_port()
    words = ["serve", "--local", BASE, "--port", str(port)]
    print(f"$ lorry {' '.join(words)} &", flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, "-m", "scripts.cli", *words], env=environment, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, child)
        yield url
    finally:
        child.terminate()
        child.wait(60)


def answer(url: str, model: str) -> str:
    """What the model says to the question."""
    body: dict[str, Any] = {"model": model, "messages": QUESTION, "max_tokens": 24, "temperature": 0}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300)
    reply.raise_for_status()
    said: str = reply.json()["choices"][0]["message"]["content"]
    print(f"  {model}: {said!r}", flush=True)
    return said


def show() -> None:
    """The whole way. Raises Broken for what is not as promised."""
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    recipe = (ROOT / "recipes" / "smoke" / "zero3.yaml").read_text(encoding="utf-8")
    (OUT / "other.yaml").write_text(recipe.replace("learning_rate: 5e-3", "learning_rate: 8e-3"), encoding="utf-8")
    lorry("run", "smoke/zero3", "--training-set", str(SET), "--job", "first-1")
    lorry("run", "other.yaml", "--training-set", str(SET), "--job", "second-1")
    for job in ("first-1", "second-1"):
        lorry("evaluate", job)
    with server() as url:
        lorry("serve", "first-1", "--at", url, "--adapters", (OUT / "adapters").as_uri())
        lorry("serve", "second-1")
        said = {model: answer(url, model) for model in (BASE, "first-1", "second-1")}
        if len(set(said.values())) != len(said):
            raise Broken(f"two of them say the same: {said}")
        lorry("serve", "--roll-back")
        live = json.loads(lorry("serve", "--history", "--json"))[-1]["live"]
        if live != "first-1":
            raise Broken(f"after the way back {live} is live")
        if answer(url, "first-1") != said["first-1"]:
            raise Broken("after the way back first-1 says something else")
    lorry("audit", "verify")


def main() -> int:
    """0 when everything was as promised, 1 with a sentence otherwise."""
    try:
        show()
    except (Broken, httpx.HTTPError) as error:
        print(f"demo-serve: {error}", file=sys.stderr)
        return 1
    print("proven: the adapter answers as it was trained to, and the one before it is live again")
    return 0


def _wait(url: str, child: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + START_SECONDS
    while child.poll() is None and time.monotonic() < give_up:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise Broken("the local server did not start")


if __name__ == "__main__":
    sys.exit(main())
