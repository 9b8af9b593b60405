"""What each answer of Runpod's REST v2 means for us: try again, try the next place, look again, or stop.

verdict(400, "There are no instances currently available")   # "next_candidate"
"""

from __future__ import annotations

import re
from typing import Literal

from scripts.errors import Problem, ProviderError

Verdict = Literal["retry", "next_candidate", "refresh", "stop"]
"""retry: the same request, later. next_candidate: another GPU or datacentre. refresh: read the object again first.
stop: asking again changes nothing."""

NO_ANSWER = 0  # in the place of a status, where the connection broke
_NO_STOCK = re.compile(r"no (longer any )?(instances|machines|capacity|gpus?)\b|out of (stock|capacity)", re.IGNORECASE)
_NO_MONEY = re.compile(r"(insufficient|not enough) (balance|funds|credit)", re.IGNORECASE)
_TRANSIENT = {NO_ANSWER, 408, 425, 429}
_AGAIN = "run the same command again"
_ADVICE = {
    NO_ANSWER: "check the network and RUNPOD_API_BASE_URL",
    400: "correct the value it names",
    401: "set RUNPOD_API_KEY to a key that is live",
    402: "add credit to the Runpod account",
    403: "give the key of RUNPOD_API_KEY read and write access to this, or choose another GPU",
    404: "check the id; it may have been removed",
    409: "look at what is there now; it does not allow this",
    410: "this address has been retired; set RUNPOD_API_BASE_URL to the address of REST v2, or unset it",
    422: "correct the value it names; nothing was changed",
    429: f"wait a minute, then {_AGAIN}",
}


class RunpodError(ProviderError):
    """Runpod refused, failed or did not answer.

    status: the HTTP status, NO_ANSWER when none came. verdict: what the caller may do.
    maybe_done: the request may have been carried out all the same, so look before you repeat it.
    """

    code = "runpod"

    def __init__(self, where: str, status: int, detail: str, *, maybe_done: bool = False, wait_seconds: int = 0):
        self.status = status
        self.verdict = verdict(status, detail)
        self.maybe_done = maybe_done
        self.lasts = status == 401
        said = "no answer" if status == NO_ANSWER else f"status {status}"
        step = advice(status, detail, wait_seconds)
        if maybe_done:
            step = f"it may have been carried out: look before you repeat it; {step}"
        super().__init__(Problem(where, f"{said}: {detail}" if detail else said, step))


def verdict(status: int, detail: str) -> Verdict:
    """What a status other than 2xx allows. Runpod has no machine code for want of stock or money, only its sentence."""
    if status == 402 or _NO_MONEY.search(detail):
        return "stop"
    if status in (400, 403) or _NO_STOCK.search(detail):
        return "next_candidate"  # 400 is also a broken rule: when every candidate gets it, suspect the request
    if status in _TRANSIENT or status >= 500:
        return "retry"
    return "refresh" if status == 409 else "stop"


def advice(status: int, detail: str, wait_seconds: int = 0) -> str:
    """The next step for a person."""
    if _NO_MONEY.search(detail):
        return _ADVICE[402]
    if _NO_STOCK.search(detail):
        return "choose another datacentre or GPU: see `lorry capacity`"
    if wait_seconds:
        return f"wait {wait_seconds} seconds, then {_AGAIN}"
    if status >= 500:
        return f"Runpod has trouble: {_AGAIN} later"
    return _ADVICE.get(status, f"check RUNPOD_API_BASE_URL; this answer is not one of REST v2, so {_AGAIN} after that")
