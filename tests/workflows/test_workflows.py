"""The workflows: sound by the schema and zizmor, pinned, without lasting cloud keys, and each job really run by act."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from scripts.fake_runpod.server import LocalRunpod
from scripts.store import open_store
from tests.money.jobs import Life
from tests.workflows.conftest import KEY, ROOT, USES, WORKFLOWS, Run

pytestmark = pytest.mark.slow


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


def test_a_plan_over_the_budget_launches_nothing(act: Run, tmp_path: Path) -> None:
    store = tmp_path / "store"
    inputs = {
        "recipe": "qwen3-8b/zero3",
        "training_set": "examples/bicycle-care.jsonl",
        "job": "too-dear",
        "backend": "ec2",
    }
    words = [word for name, value in inputs.items() for word in ("--input", f"{name}={value}")]
    done = act(
        "workflow_dispatch", "train", "--var", f"LORRY_STORE={store.as_uri()}", *words, "--input", "budget_usd=0.01"
    )
    assert done.returncode != 0
    assert "ec2-p5-4xlarge-1 may cost " in done.stdout, "where a launch would go, and not the cheapest of all"
    assert "the budget is 0.01" in done.stdout
    assert "not checked  ec2: LORRY_EC2_TEMPLATE is not set" in done.stdout
    assert not (store / "too-dear").exists()
