"""Launches a job in a process of its own, and dies by kill -9 where it is told: python -m tests.container.launcher

argv: store, job id, moment ("before" or "after" the machine is asked for, or "never").
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.job import LaunchSpec
from scripts.backends.local import LocalBackend
from scripts.launch import launch
from scripts.store import open_store


class Dying(LocalBackend):
    """The local backend in a process that dies around submit."""

    moment = "never"

    def submit(self, spec: LaunchSpec, request: Mapping[str, Any]) -> dict[str, Any]:
        if self.moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        handle = super().submit(spec, request)
        if self.moment == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return handle


def main() -> None:
    url, spec_file, data, module, moment = sys.argv[1:]
    spec = LaunchSpec.model_validate_json(Path(spec_file).read_bytes())
    backend = Dying(os.environ, module)
    backend.moment = moment
    submission = launch(open_store(url), spec, None, Path(data), backend, time.time())
    print(submission.handle["pid"])


if __name__ == "__main__":
    main()
