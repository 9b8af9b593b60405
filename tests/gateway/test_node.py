"""Clients for Node: npm's `runpod-sdk` and `openai`, unmodified, and our own from clients/web, compiled by `tsc`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from recipes.serving import Outcomes, Place
from scripts.serving.history import following
from scripts.serving.outcomes import counted
from scripts.store import open_store
from scripts.webhook import signed_headers
from tests.gateway.conftest import REPOSITORY, Front

HERE = Path(__file__).parent / "node"
SECRET = "webhook-secret"


@pytest.fixture(scope="session")
def packages() -> Path:
    """A folder with exactly the packages of package-lock.json, installed once per lock file into the cache."""
    cache = Path(os.environ.get("LORRY_CACHE") or Path.home() / ".cache" / "lorry")
    lock = hashlib.sha256((HERE / "package-lock.json").read_bytes()).hexdigest()[:16]
    folder = cache / f"node-{lock}"
    if not (folder / "installed").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, folder / name)
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        (folder / "installed").touch()
    return folder


@pytest.fixture(scope="session")
def work(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages, our own client compiled, and the scripts that use them."""
    work = tmp_path_factory.mktemp("node")
    (work / "node_modules").symlink_to(packages / "node_modules")
    for script in HERE.glob("*.mjs"):
        shutil.copy(script, work)
    (work / "package.json").write_text('{"type": "module"}')
    compiler = packages / "node_modules" / "typescript" / "bin" / "tsc"
    command = ["node", str(compiler), "--project", str(REPOSITORY / "clients" / "web"), "--outDir", str(work)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert built.returncode == 0, built.stdout
    return work


def run_node(work: Path, *words: str) -> str:
    """What a script printed."""
    done = subprocess.run(["node", *words], cwd=work, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_clients_for_node_work_unmodified_and_so_does_our_own(front: Front, work: Path) -> None:
    for name in ("long-1", "long-2"):
        front.script(name, steps=100_000)
    body = json.dumps({"status": "COMPLETED"})
    webhook = {
        "secret": SECRET,
        "body": body,
        "headers": signed_headers(SECRET, "job-1.completed", body.encode(), 1_790_000_000),
    }
    said = run_node(work, "clients.mjs", front.url, json.dumps(front.input()), json.dumps(webhook))
    assert said == "all well"


@pytest.mark.slow
def test_the_web_app_gives_a_canary_its_share_and_its_counts_are_read_again(still: Front, work: Path) -> None:
    store = open_store(still.folder("x").parent.as_uri())
    place = Place(url="https://llm.example", base="lorry/smoke", adapters="file:///adapters", mounted="/adapters")
    done: dict[str, Any] = {"place": place, "by": "ann", "at": 1.0, "outcome": "done", "job_id": "good-1"}
    state = following(store, "main", None, live="good-1", deed="publish", **done)
    following(store, "main", state, deed="canary", canary="good-2", canary_share=0.2, **done)
    chosen = json.loads(run_node(work, "chats.mjs", still.url))
    assert len(chosen) == 4000
    for conversation, model in chosen.items():  # the rule of docs/web-app.md, by another implementation
        digest = hashlib.sha256(f"clients/acme/good-2\n{conversation}".encode()).digest()
        is_canary = int.from_bytes(digest[:4], "big") / 2**32 < 0.2
        assert model == ("clients/acme/good-2" if is_canary else "clients/acme/good-1")
    assert counted(store, "main", "good-1", 0.0, time.time()) == Outcomes(answered=2, failed=2)
    assert counted(store, "main", "good-2", 0.0, time.time()) == Outcomes(answered=0, failed=1)


def test_our_own_client_needs_no_package_and_stays_short() -> None:
    web = REPOSITORY / "clients" / "web"
    assert "dependencies" not in json.loads((web / "package.json").read_text())
    text = (web / "lorry.ts").read_text()
    assert "import " not in text
    assert len(text.splitlines()) <= 320
