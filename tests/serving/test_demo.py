"""`make demo-serve`, as a person runs it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.serving.conftest import ROOT


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_goes_from_a_training_set_to_a_proven_answer_and_back() -> None:
    done = subprocess.run(
        [sys.executable, "examples/demo_serve.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "proven: the adapter answers as it was trained to" in done.stdout
    assert "live: second-1" in done.stdout
    assert "roll back first-1: done" in done.stdout
