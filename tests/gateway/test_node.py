"""Clients for Node: npm's `runpod-sdk` and `openai`, unmodified, and our own from clients/web, compiled by `tsc`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_clients_for_node_work_unmodified_and_so_does_our_own(front: Front, packages: Path, tmp_path: Path) -> None:
    work = tmp_path / "node"
    work.mkdir()
    (work / "node_modules").symlink_to(packages / "node_modules")
    shutil.copy(HERE / "clients.mjs", work)
    (work / "package.json").write_text('{"type": "module"}')
    compiler = packages / "node_modules" / "typescript" / "bin" / "tsc"
    command = ["node", str(compiler), "--project", str(REPOSITORY / "clients" / "web"), "--outDir", str(work)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert built.returncode == 0, built.stdout
    for name in ("long-1", "long-2"):
        front.script(name, steps=100_000)
    body = json.dumps({"status": "COMPLETED"})
    webhook = {
        "secret": SECRET,
        "body": body,
        "headers": signed_headers(SECRET, "job-1.completed", body.encode(), 1_790_000_000),
    }
    command = ["node", "clients.mjs", front.url, json.dumps(front.input()), json.dumps(webhook)]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == "all well"


def test_our_own_client_needs_no_package_and_stays_short() -> None:
    web = REPOSITORY / "clients" / "web"
    assert "dependencies" not in json.loads((web / "package.json").read_text())
    text = (web / "lorry.ts").read_text()
    assert "import " not in text
    assert len(text.splitlines()) <= 260
