"""What a backend can do. A capability is a type: ask `isinstance(backend, KeepsLogs)`, never for a flag.

Every backend is a Backend; those that quote live prices or keep logs outside the store are more than that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from recipes.job import LaunchSpec
from recipes.recipe import BackendName
from scripts.errors import Problem

if TYPE_CHECKING:
    from scripts.forgotten import Forgotten
    from scripts.job_folder import JobFiles
    from scripts.store import Store

Phase = Literal["waiting", "running", "gone"]
Handle = Mapping[str, Any]
"What submit returned, as submission.json keeps it: enough to find the machine again."


NAME_PREFIX = "lorry-"


def machine_name(job_id: str) -> str:
    """The one name that machines of a job have at their provider."""
    return NAME_PREFIX + job_id


def long_store(store: str, characters: int) -> list[Problem]:
    """What is wrong with a store whose URL does not fit where the provider must carry it."""
    got = f"{store[:60]}... has {len(store)} characters"
    return [Problem("store", got, f"at most {characters}: a shorter prefix")] if len(store) > characters else []


def machine_of(handle: Handle) -> Any:
    """The provider's own id of the machine in a handle, or of all its nodes; None in one that was never completed."""
    return next((handle[key] for key in ("pod", "cluster", "training_job", "instances") if handle.get(key)), None)


@dataclass(frozen=True)
class Observation:
    """What the provider says about one machine.

    `usd` is None where the provider does not say what was spent. A failed look raises ProviderError: only a provider
    that answered that the machine is not there makes it "gone".
    """

    phase: Phase
    detail: str = ""
    usd: float | None = None
    was_taken: bool = False
    "Gone because the provider wanted it back: the job may go on elsewhere."


@dataclass(frozen=True)
class Owned:
    """A machine that is provably ours: it carries our tag and a job id."""

    job_id: str
    handle: Handle
    phase: Phase
    started_at: float | None = None
    usd_per_hour: float | None = None


@dataclass(frozen=True)
class LiveOffer:
    """What the provider sells right now under the name of one of hardware.yaml's offers."""

    offer: str
    available: bool
    usd_per_hour: float


Source = Literal["bill", "hours", "lifetime"]
"""bill: what the provider charged; lifetime: how long the provider says each machine lived x its price; hours: the
job's own hours x price, as far as is known."""


@dataclass(frozen=True)
class Charges:
    """What a job's machines cost, by machine, as far as is known now. is_closed: nothing will be added."""

    usd: Mapping[str, float]
    source: Source = "bill"
    is_closed: bool = False


@runtime_checkable
class Backend(Protocol):
    """One way to run a job."""

    name: BackendName

    def request(self, spec: LaunchSpec) -> dict[str, Any]:
        """The provider's request body for this job. Pure; holds no secret. Raises Refused."""

    def submit(self, spec: LaunchSpec, request: Mapping[str, Any]) -> dict[str, Any]:
        """Starts the machine and returns its handle; twice for one job id starts it once. Raises ProviderError."""

    def observe(self, handle: Handle) -> Observation:
        """What the provider says about the machine. Raises ProviderError when it could not be asked."""

    def stop(self, handle: Handle) -> None:
        """Ends the machine; no error when it is gone already. Raises ProviderError."""

    def owned(self) -> list[Owned]:
        """Every machine of ours that may still cost something. Raises ProviderError."""


@runtime_checkable
class KeepsLogs(Protocol):
    """A backend whose provider keeps the machine's output."""

    def logs(self, handle: Handle) -> Iterator[str]:
        """The lines so far, oldest first. Raises ProviderError."""


@runtime_checkable
class LeavesThings(Protocol):
    """A backend that may leave behind what costs money although nothing runs in it."""

    def forgotten(self) -> list[Forgotten]:
        """What of ours a person should look at. Raises ProviderError."""


@runtime_checkable
class KnowsCharges(Protocol):
    """A backend whose provider says by machine what a job did cost."""

    def charges(self, store: Store, files: JobFiles) -> Charges | None:
        """The charges for all that a job rented, as far as they are known. Raises ProviderError."""


@runtime_checkable
class QuotesLive(Protocol):
    """A backend whose provider can be asked for stock and price."""

    def offers(self) -> list[LiveOffer]:
        """Stock and price now of our offers on this backend. Raises ProviderError."""
