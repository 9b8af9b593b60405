"""checkov finds nothing that is not fixed or skipped beside the resource with a reason."""

from __future__ import annotations

import json
import os
import re
import subprocess

import pytest

from tests.infra.conftest import INFRA
from tests.tools import tool_environment

VERSION = "3.3.30"


@pytest.fixture(scope="session")
def checkov():
    """Python of the environment that holds checkov: it needs 291 MB of its own."""
    return tool_environment(f"checkov=={VERSION}") / "bin" / "python"


def accepted():
    """The ids of all skips that stand beside our resources."""
    return {found for file in INFRA.rglob("*.tf") for found in re.findall(r"#checkov:skip=(\w+):", file.read_text())}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_finding_is_fixed_or_accepted_with_a_reason(checkov, tmp_path):
    # Roots pull the stacks and modules in, so each resource is seen with the values it really gets.
    words = ["-d", str(INFRA), "--framework", "terraform", "--output", "json", "--skip-download"]
    done = subprocess.run(
        [checkov, "-m", "checkov.main", *words],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LOG_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
    )
    report = json.loads(done.stdout)
    failed = {(f["check_id"], f["resource"]) for f in report["results"]["failed_checks"]}
    assert failed == set(), "fix it, or write #checkov:skip=ID:reason into the resource"
    used = {f["check_id"] for f in report["results"]["skipped_checks"]}
    assert used == accepted(), "a skip that hides nothing must go"
    assert report["summary"]["passed"] > 100
    assert report["summary"]["parsing_errors"] == 0
