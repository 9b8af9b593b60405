"""Why a training process ended: one cause of recipes.causes and one sentence, from any exception."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

from recipes.causes import ADVICE, EXIT_CODES, Cause
from recipes.errors import LorryError


class TrainingStopped(Exception):
    """A foreseen end. `cause` is a word of recipes.causes, the text a sentence for a person."""

    def __init__(self, cause: Cause, sentence: str) -> None:
        super().__init__(sentence)
        self.cause = cause


# Texts of torch, gloo and NCCL that mean another process is gone; none of them has an exception class of its own.
LOST_RANK = ("connection closed by peer", "connection reset", "broken pipe", "gloo", "nccl", "timed out waiting")
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")
DISK_FULL = ("no space left on device", "os error 28", "errno 28")


def exit_code(work: Callable[[], object]) -> int:
    """Does the work of a verb: 0, or EXIT_CODES of the cause with its sentence on standard error."""
    try:
        work()
    except Exception as error:
        cause, sentence = explain(error)
        print(sentence, file=sys.stderr, flush=True)
        return EXIT_CODES[cause]
    return 0


def explain(error: BaseException) -> tuple[Cause, str]:
    """The cause and the sentence of an exception; what nobody foresaw is `unexpected`, with its text."""
    if isinstance(error, TrainingStopped):
        return error.cause, str(error)
    cause = _cause(error)
    text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    if cause == "unexpected":
        return cause, text
    return cause, f"{ADVICE[cause]} ({text})"


def _cause(error: BaseException) -> Cause:
    name, text = type(error).__name__, str(error).lower()
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or _says(text, OUT_OF_MEMORY):
        return "out_of_memory"
    if (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or _says(text, DISK_FULL):
        return "disk_full"
    if name in ("DistBackendError", "DistNetworkError", "DistError") or _says(text, LOST_RANK):
        return "lost_rank"
    if isinstance(error, ModuleNotFoundError):
        return "cannot_run_here"
    return "bad_data" if isinstance(error, LorryError) else "unexpected"


def _says(text: str, signs: tuple[str, ...]) -> bool:
    return any(sign in text for sign in signs)
