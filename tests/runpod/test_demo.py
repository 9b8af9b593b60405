"""`make demo-runpod`, as a person runs it: to its end, and ended by Ctrl-C in the middle."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from scripts.adapter import verify_adapter
from tests.runpod.conftest import REPOSITORY

COMMAND = ["examples/demo_runpod.py"]
LIMIT_SECONDS = 500.0


@contextmanager
def demo(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The demo in a process group of its own, with its temporary files in `folder`."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "PYTHONPATH": str(REPOSITORY),
    }
    child = subprocess.Popen(
        [sys.executable, *COMMAND],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def left_by(folder: Path) -> list[str]:
    """The processes whose environment names the folder: the demo hands it on to everything it starts."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(folder).encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it has ended meanwhile
            continue
    return found


def test_make_runs_the_demo() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    assert re.search(r"^demo-runpod: .*\n\t\$\(BIN\)/python " + COMMAND[0] + "$", makefile, flags=re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_client_ends_with_a_verified_adapter_a_bill_and_no_pod(tmp_path: Path) -> None:
    with demo(tmp_path) as running:
        said, _ = running.communicate(timeout=LIMIT_SECONDS)
    assert running.returncode == 0, said
    stages = [line.split()[0] for line in said.splitlines()]
    asked = ["submit", "quote", "status", "download", "verify", "pod", "bill", "adapter", "done"]
    assert [stage for stage in dict.fromkeys(stages) if stage in asked] == asked
    adapter = Path(re.search(r"^adapter +(.*)$", said, flags=re.MULTILINE)[1])  # type: ignore[index]
    manifest = verify_adapter(adapter)
    assert (manifest.recipe_name, manifest.effect > 0) == ("smoke/pod", True)
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 8
    assert left_by(tmp_path) == []
    assert list(tmp_path.glob("lorry-demo-*")) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    with demo(tmp_path) as running:
        assert running.stdout is not None
        said = []
        for line in running.stdout:
            said.append(line)
            if "IN_PROGRESS" in line and "loading" in line:
                break
        else:
            pytest.fail("".join(said))
        assert any("scripts.container" in command for command in left_by(tmp_path))
        running.send_signal(signal.SIGINT)
        rest, _ = running.communicate(timeout=LIMIT_SECONDS)
    assert running.returncode == 130, rest
    give_up = time.monotonic() + 60
    while left := left_by(tmp_path):
        assert time.monotonic() < give_up, left
        time.sleep(0.2)
    assert list(tmp_path.glob("lorry-demo-*")) == []
