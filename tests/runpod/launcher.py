"""Launches a job in a process of its own and dies by kill -9 where it is told: python -m tests.runpod.launcher

argv: store, spec file, data, moment ("recorded", "claimed", "created" or "never"). The environment is the launcher's.
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
from scripts.backends.runpod_pod import RunpodPodBackend
from scripts.launch import launch
from scripts.store import open_store


class Dying(RunpodPodBackend):
    """The backend in a process that dies around the create."""

    moment = "never"

    def submit(self, spec: LaunchSpec, request: Mapping[str, Any]) -> dict[str, Any]:
        self._die_at("recorded")
        return super().submit(spec, request)

    def _create(self, *given: Any) -> Any:
        self._die_at("claimed")
        pod = super()._create(*given)
        self._die_at("created")
        return pod

    def _die_at(self, moment: str) -> None:
        if self.moment == moment:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    url, spec_file, data, moment = sys.argv[1:]
    backend = Dying(os.environ)
    backend.moment = moment
    spec = LaunchSpec.model_validate_json(Path(spec_file).read_bytes())
    print(launch(open_store(url), spec, None, Path(data), backend, time.time()).handle["pod"])


if __name__ == "__main__":
    main()
