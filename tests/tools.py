"""What takes long to make and is made once: tools in an environment of their own, and what all workers of a run share.

python = tool_environment("checkov==3.3.30") / "bin" / "python"
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import venv
from collections.abc import Callable
from pathlib import Path

import pytest


def tool_environment(*pins: str) -> Path:
    """The folder of a virtual environment that holds exactly these packages. Two processes make it once."""
    cache = Path(os.environ.get("LORRY_CACHE") or Path.home() / ".cache" / "lorry")
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / re.sub(r"[^a-z0-9.]+", "-", "-".join(pins).lower())
    done = folder / "complete"
    with (cache / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            venv.create(folder, with_pip=True, clear=True, symlinks=True)
            subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *pins], check=True)
            done.touch()
    return folder


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that make(folder) has filled, the same for all workers of this test run. Nobody may change it."""
    root = factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / name
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder.with_suffix(".done")
        if not done.exists():
            make(folder)
            done.touch()
    return folder
