"""The process that holds the model of the local server: asked in JSON lines, one at a time.

worker = Worker(answer_command(folder), os.environ); worker.ask({"op": "load", "name": "a", "path": "/adapters/a"})
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.errors import InputError, Problem, ProviderError

Json = dict[str, Any]


def answer_command(model: Path) -> list[str]:
    """The command of the child for a base model's folder."""
    return [sys.executable, "-m", "trainer.answer", "--model", str(model)]


class Worker:
    """A child that answers. It ends when this process does: its input closes."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._lock = threading.Lock()
        self._child = subprocess.Popen(
            command, env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if not self._answer().get("ready"):
            raise ProviderError(Problem("model", "it did not load", "see the lines above"))

    def ask(self, asked: Json) -> Json:
        """The answer. Raises InputError with the child's own sentence, ProviderError when the child is gone."""
        with self._lock:
            try:
                assert self._child.stdin is not None
                self._child.stdin.write(json.dumps(asked) + "\n")
                self._child.stdin.flush()
                answer = self._answer()
            except (BrokenPipeError, ValueError):
                raise ProviderError(Problem("model", "its process has ended", "start the server again")) from None
        if "error" in answer:
            raise InputError(Problem("model", str(answer["error"]), "see the request"))
        return answer

    def close(self) -> None:
        """Ends the child."""
        self._child.kill()
        self._child.wait()

    def _answer(self) -> Json:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise ProviderError(Problem("model", "its process has ended", "see the lines above"))
        return dict(json.loads(line))
