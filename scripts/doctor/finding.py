"""What a check looks at, and what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal

from scripts.backends.runpod_api import RunpodApi

State = Literal["ok", "failed", "not checked"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor. seen: what was found. step: what to do; empty when it is ok."""

    check: str
    state: State
    seen: str
    step: str = ""

    def __str__(self) -> str:
        return f"{self.state:<11}  {self.check}: {self.seen}" + (f"; {self.step}" if self.step else "")


@dataclass(frozen=True)
class Subject:
    """A set-up. rooms: the merged outputs of the Terraform roots. now: this machine's clock, with a time zone.

    models: URL of the models folder. environment: read for the endpoint and credentials of AWS. nodes: machines that
    one job takes.
    """

    now: datetime
    rooms: Mapping[str, Any] = field(default_factory=dict)
    runpod: RunpodApi | None = None
    why_no_runpod: str = "there is no key: set RUNPOD_API_KEY"
    model: str | None = None
    models: str = ""
    store: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    nodes: int = 1

    def without_runpod(self, why: str) -> Subject:
        """The same without Runpod, whose checks then say why they were not made."""
        return replace(self, runpod=None, why_no_runpod=why)


Check = Callable[[Subject], Iterable[Finding]]


def ok(check: str, seen: str) -> Finding:
    """A check that found nothing wrong."""
    return Finding(check, "ok", seen)


def failed(check: str, seen: str, step: str) -> Finding:
    """A check that found something to repair."""
    return Finding(check, "failed", seen, step)


def not_checked(check: str, why: str, step: str = "") -> Finding:
    """A check that could not be made; `step` says what would let it."""
    return Finding(check, "not checked", why, step)


NO_ROOM = "name a Terraform root, such as infra/live/prod/runpod"
