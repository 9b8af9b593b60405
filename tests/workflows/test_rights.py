"""Which runs may take the role of AWS, what pull requests never meet, and what the reaper looks after."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.backends import LAUNCHABLE, RENTS

ROOT = Path(__file__).resolve().parents[2]
TEXTS = {path.stem: path.read_text() for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))}
JOBS = {(name, job): body for name, text in TEXTS.items() for job, body in yaml.safe_load(text)["jobs"].items()}
REAP: dict[str, Any] = JOBS["reap", "reap"]
TRAIN: dict[Any, Any] = yaml.safe_load(TEXTS["train"])  # to YAML 1.1 the key `on` is true


@pytest.mark.parametrize("room", ["dev", "prod"])
def test_a_room_lets_in_every_job_that_takes_its_role_and_nobody_else(room: str) -> None:
    found = re.search(r"subjects = \[(.*?)\]", (ROOT / f"infra/live/{room}/aws/main.tf").read_text())
    assert found
    takers = [body for body in JOBS.values() if "vars.LORRY_ROLE_ARN" in str(body)]
    subjects = {
        f"environment:{job['environment']}" if "environment" in job else "ref:refs/heads/main" for job in takers
    }
    assert set(re.findall(r'"(.*?)"', found[1])) == subjects


def test_a_pull_request_meets_neither_the_role_nor_a_key() -> None:
    report = JOBS["reap", "report"]
    assert "environment" not in report
    assert report["permissions"] == {"contents": "read"}
    assert not re.search(r"secrets\.|vars\.", str(report))
    assert REAP["if"] == "github.event_name != 'pull_request'"


def test_the_reaper_knows_all_that_the_rooms_say() -> None:
    said = set(re.findall(r'^    "(\w+)": "', (ROOT / "scripts/env.py").read_text(), re.MULTILINE))
    assert {"LORRY_STORE", *RENTS.values()} <= said | {"RUNPOD_API_KEY"}
    assert said - {"RUNPOD_SERVING_ENDPOINT_ID"} <= set(REAP["env"])


def test_what_can_be_trained_by_hand_can_be_looked_after_by_the_clock() -> None:
    """The same settings, but for those of a front door and of a queue, whose jobs nobody starts by hand."""
    of_runs = {name for name, value in TRAIN["env"].items() if "vars." in value}
    assert set(REAP["env"]) - of_runs == {"LORRY_PUBLIC_URL", "RUNPOD_TRAINING_ENDPOINT_ID"}
    assert of_runs < set(REAP["env"])


def test_a_training_by_hand_is_planned_and_launched_where_it_was_asked_for() -> None:
    choices = TRAIN[True]["workflow_dispatch"]["inputs"]["backend"]["options"]
    assert set(choices) == set(LAUNCHABLE) - {"local", "runpod_queue"}
    script = "\n".join(str(step.get("run", "")) for job in TRAIN["jobs"].values() for step in job["steps"])
    calls = re.findall(r"lorry (?:plan|launch) .*", script)
    assert len(calls) == 3
    assert all('--backend "$BACKEND"' in call for call in calls)


def test_a_plan_meets_no_secret() -> None:
    assert "secrets." not in str(TRAIN["jobs"]["plan"]) + str(TRAIN["env"])


def test_the_keys_of_a_training_outlive_the_job_that_watches_it() -> None:
    train = TRAIN["jobs"]["train"]
    asked = next(s["with"]["role-duration-seconds"] for s in train["steps"] if "role-to-assume" in s.get("with", {}))
    module = (ROOT / "infra/modules/github-oidc/main.tf").read_text()
    assert train["timeout-minutes"] * 60 <= asked == 6 * 3600
    assert "max_session_duration = 6 * 3600" in module
