"""Tools that need an environment of their own, made on first use and kept under LORRY_CACHE or ~/.cache/lorry.

python = tool_environment("checkov==3.3.30") / "bin" / "python"
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import venv
from pathlib import Path


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
