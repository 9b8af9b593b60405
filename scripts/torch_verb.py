"""Runs a verb of the trainer in a process of its own, where torch is installed, and follows its progress.

torch_verb(["trainer.merge", "--job", "jobs/bicycle-1", ...], progress)
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from typing import IO

from recipes.causes import EXIT_CODES
from scripts.errors import InputError, LorryError, Problem, ProviderError, Refused, VerificationFailed
from scripts.machine import trainer_environment
from scripts.store.base import Progress, report

_ERRORS: dict[int, type[LorryError]] = {
    EXIT_CODES["disk_full"]: Refused,
    EXIT_CODES["bad_base_model"]: InputError,
    EXIT_CODES["bad_targets"]: InputError,
    EXIT_CODES["bad_data"]: InputError,
    EXIT_CODES["no_effect"]: VerificationFailed,
}


def torch_verb(words: list[str], progress: Progress | None) -> None:
    """Runs `python -m WORDS`. Its standard output is a line {"done": bytes, "total": bytes} per step.

    Raises InputError where torch is not installed or the verb refuses its input, Refused when space is short,
    VerificationFailed when what it made is not what it should be, ProviderError when it ends otherwise.
    """
    verb = words[0].removeprefix("trainer.")
    if importlib.util.find_spec("torch") is None:
        want = "pip install 'lorry[train]', or run this command on a machine that has it"
        raise InputError(Problem(verb, "torch is not installed here", want))
    environment = trainer_environment(os.environ, on_cpu=False)
    del environment["OMP_NUM_THREADS"]  # one process: it may use every core
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, "-m", *words], env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        assert process.stdout
        _follow(process.stdout, progress)
        code = process.wait()
        errors.seek(0)
        said = (errors.read().strip().splitlines() or [f"exit code {code}"])[-1][:500]
    if code in _ERRORS:
        raise _ERRORS[code](Problem(verb, said))
    if code:
        raise ProviderError(Problem(f"python -m trainer.{verb}", said, "run it again: what is whole is kept"))


def _follow(lines: IO[str], progress: Progress | None) -> None:
    before = 0
    for line in lines:
        if not line.startswith('{"done"'):  # a library's notice
            continue
        done = int(json.loads(line)["done"])
        report(progress, done - before)
        before = done
