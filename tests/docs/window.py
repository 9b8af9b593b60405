"""A terminal window in a copy of the repository, for tests that do what a page says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.docs.made import ROOT


class Window:
    """Runs shell blocks as they are printed, one after the other; what one exports the next one sees."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment

    def run(self, block: str, where: str) -> str:
        """What the block printed. A block that fails fails the test, which then says where it stands."""
        script = f"set -euo pipefail\n{block}\nenv -0 > {self.folder}/.window\n"
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, f"{where}:\n{block}\n{done.stdout[-3000:]}"
        pairs = (self.folder / ".window").read_text().split("\0")
        self.environment = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        return done.stdout


def copy_of_the_repository(folder: Path) -> Path:
    """A clone with what is changed and not yet committed."""
    subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
    command = ["git", "ls-files", "-m", "-o", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    for name in listed.stdout.split():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def put_programs(folder: Path, **more: str) -> Path:
    """A folder for the PATH: lorry and Python as installed here, a `make` that only says its words, and more."""
    folder.mkdir()
    programs = {
        "lorry": f'exec {sys.executable} -m scripts.cli "$@"',
        "make": 'echo "make $*"',  # `make demo` and `make test` are tests of their own
        "python3.11": f'exec {sys.executable} "$@"',
        **more,
    }
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return folder
