"""Runs the conversion of a base model into a quantised one in a process of its own, where torch is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import IO

from recipes.causes import EXIT_CODES
from recipes.recipe import Quantize
from scripts.errors import InputError, Problem, ProviderError, Refused
from scripts.machine import trainer_environment
from scripts.models import quantising_command
from scripts.store import Progress, report


def convert(
    base: Path, to: Path, model: str, quantize: Quantize, revision: str | None, progress: Progress | None
) -> None:
    """Fills `to` with the quantised weights of the model in `base`; what is there and sound is kept.

    Raises InputError where torch is not installed or the base cannot be converted, Refused when space is short,
    ProviderError when the process ends otherwise.
    """
    if importlib.util.find_spec("torch") is None:
        want = "pip install 'lorry[train]', or run `lorry stage --quantize` on a machine that has it"
        raise InputError(Problem("--quantize", "torch is not installed here", want))
    environment = trainer_environment(os.environ, on_cpu=False)
    del environment["OMP_NUM_THREADS"]  # one process: it may use every core
    command = quantising_command(base, to, model, quantize) + (["--revision", revision] if revision else [])
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout
        _follow(process.stdout, progress)
        code = process.wait()
        errors.seek(0)
        said = errors.read().strip().splitlines()[-1:] or [f"exit code {code}"]
    if code:
        raise _failure(code, said[0][:500])


def _follow(lines: IO[str], progress: Progress | None) -> None:
    before = 0
    for line in lines:
        done = int(json.loads(line)["done"])
        report(progress, done - before)
        before = done


def _failure(code: int, said: str) -> InputError | Refused | ProviderError:
    if code == EXIT_CODES["disk_full"]:
        return Refused(Problem("stage", said))
    if code == EXIT_CODES["bad_base_model"]:
        return InputError(Problem("stage", said))
    return ProviderError(Problem("python -m trainer.quantize", said, "run it again: what is sound is kept"))
