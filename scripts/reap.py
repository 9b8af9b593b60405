"""The stop that needs nobody: ends machines that are provably ours and overdue, and reports what is forgotten.

rounds = make_rounds(backends, open_store, is_ours, now=time.time(), ends=True); rounds.decisions, rounds.troubles

A machine is ours when three things agree: its name, the deadline in its environment, and a job folder in a store of
this account that asked for it. Whatever lacks one of the three is never touched. Volumes, endpoints and the disks of
exited Pods are reported with what they cost a month, and never deleted. A machine outlives its limits by the time
between two runs at most, so run it every few minutes. A provider that does not answer keeps no machine of another
alive, and a report keeps none at all: reports are asked for when all is ended that must be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from recipes.job import JOB_ID
from recipes.recipe import BackendName
from scripts.audit import record
from scripts.backends.base import Backend, LeavesThings, Owned, machine_name, machine_of
from scripts.errors import LorryError
from scripts.forgotten import MONTH_HOURS, Forgotten
from scripts.job_folder import JobFiles, read_jobs
from scripts.overstay import overstay
from scripts.state import LENIENCY, mute_start, without_waits
from scripts.stop import stop_job
from scripts.store import Store

OpenStore = Callable[[str], Store]


@dataclass(frozen=True)
class Machine:
    """One machine as its backend shows it, and the job folder it claims to work on, where there is one."""

    backend: BackendName
    owned: Owned
    files: JobFiles | None

    @property
    def name(self) -> str:
        return str(self.owned.handle.get("name", self.owned.job_id))


@dataclass(frozen=True)
class World:
    """What there is at one moment."""

    machines: tuple[Machine, ...] = ()
    forgotten: tuple[Forgotten, ...] = ()


@dataclass(frozen=True)
class Decision:
    """stop: end the machine. report: tell a person, who decides."""

    action: Literal["stop", "report"]
    name: str
    reason: str
    usd_per_month: float
    machine: Machine | None = None


@dataclass(frozen=True)
class Reaped:
    """One machine that was ended, or was not: then `trouble` says why."""

    name: str
    trouble: str = ""


@dataclass
class Rounds:
    """What one run saw and did. troubles: by backend, report or machine, why nothing was seen or it was not ended.

    unseen: backends that did not answer, of which nothing is known.
    """

    machines: list[Machine] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    troubles: dict[str, str] = field(default_factory=dict)
    unseen: set[BackendName] = field(default_factory=set)

    def report(self, where: str, forgotten: Callable[[], Iterable[Forgotten]]) -> None:
        """Adds what is forgotten at one place, or the trouble of finding it."""
        try:
            self.decisions += judge(World(forgotten=tuple(forgotten())), now=0.0)
        except LorryError as error:
            self.troubles[where] = str(error)


def make_rounds(
    backends: Mapping[BackendName, Backend],
    open_store: OpenStore,
    is_ours: Callable[[str], bool],
    now: float,
    *,
    ends: bool,
) -> Rounds:
    """Looks, judges and, when it `ends` anything, reaps, at one backend after the other; then what each left behind."""
    rounds = Rounds()
    for name, backend in backends.items():
        try:
            machines = look({name: backend}, open_store, is_ours)
        except LorryError as error:
            rounds.troubles[name] = str(error)
            rounds.unseen.add(name)
            continue
        decisions = judge(World(tuple(machines)), now)
        rounds.machines += machines
        rounds.decisions += decisions
        reaped = reap(decisions, backends, open_store, now) if ends else []
        rounds.troubles.update({one.name: one.trouble for one in reaped if one.trouble})
    for name, backend in backends.items():
        if isinstance(backend, LeavesThings) and name not in rounds.unseen:
            rounds.report(f"{name} report", backend.forgotten)
    return rounds


def look(
    backends: Mapping[BackendName, Backend], open_store: OpenStore, is_ours: Callable[[str], bool]
) -> list[Machine]:
    """Every machine that carries our mark, with its job folder where its store is one of ours.

    Raises ProviderError: a look at these backends that is not whole is none.
    """
    shown = [(name, owned) for name, backend in backends.items() for owned in backend.owned()]
    wanted: dict[str, list[str]] = {}
    for _, owned in shown:
        if is_ours(_store(owned)) and JOB_ID.fullmatch(owned.job_id):
            wanted.setdefault(_store(owned), []).append(owned.job_id)
    known = {(url, files.job_id): files for url, ids in wanted.items() for files in read_jobs(open_store(url), ids)}
    return [Machine(name, owned, known.get((_store(owned), owned.job_id))) for name, owned in shown]


def judge(world: World, now: float) -> list[Decision]:
    """What is to be done about each thing; nothing for what may stay. Pure. `now`: seconds since 1970."""
    decisions = []
    for machine in world.machines:
        month = (machine.owned.usd_per_hour or 0.0) * MONTH_HOURS
        if problem := _unproved(machine):
            decisions.append(Decision("report", machine.name, f"it has our mark, but {problem}; look at it", month))
        elif machine.owned.phase != "gone" and (reason := overdue_reason(machine, now)):
            decisions.append(Decision("stop", machine.name, reason, month, machine))
    return decisions + [Decision("report", f.name, f.reason, f.usd_per_month) for f in world.forgotten]


def overdue_reason(machine: Machine, now: float) -> str | None:
    """Why a machine that is ours must go now; None while it may stay. Pure."""
    files, owned = machine.files, machine.owned
    deadline = float(owned.handle["deadline"])
    if now > deadline:
        return f"its deadline passed {(now - deadline) / 60:.0f} minutes ago"
    if files is None or files.launch is None:
        return None
    if owned.started_at is not None and owned.usd_per_hour is not None:
        usd = (without_waits(files, owned.phase, now) - owned.started_at) / 3600 * owned.usd_per_hour
        if usd > files.launch.cap_usd * LENIENCY:
            return f"it cost ${usd:.2f}; the cap is ${files.launch.cap_usd:.2f}"
    mute = mute_start(files, owned.started_at, now) if owned.started_at is not None else None
    return overstay(files, now) or mute


def reap(
    decisions: Iterable[Decision], backends: Mapping[BackendName, Backend], open_store: OpenStore, now: float
) -> list[Reaped]:
    """Carries out the stops: the reason is recorded with the job first, then the machine is ended.

    One that cannot be ended never keeps the others alive; the next run tries it again.
    """
    done = []
    for decision in decisions:
        if decision.action != "stop" or decision.machine is None:
            continue
        try:
            _end(decision.machine, decision.reason, backends[decision.machine.backend], open_store, now)
            done.append(Reaped(decision.name))
        except LorryError as error:
            done.append(Reaped(decision.name, str(error)))
    return done


def _end(machine: Machine, reason: str, backend: Backend, open_store: OpenStore, now: float) -> None:
    """Ends this very machine. Its job is stopped with it, unless the job has another machine by now."""
    submission = machine.files.submission if machine.files else None
    current = machine_of(submission.handle) if submission else None
    if current in (None, machine_of(machine.owned.handle)):
        try:
            stop_job(open_store(_store(machine.owned)), machine.owned.job_id, backend, "reaper", reason, now)
        finally:
            backend.stop(machine.owned.handle)  # also when the store does not answer: the money comes first
    else:
        backend.stop(machine.owned.handle)
        note = f"ended a machine that it no longer uses: {reason}"
        store = open_store(_store(machine.owned))
        record(store, "stop", machine.owned.job_id, who="lorry (reaper)", now=now, note=note)


def _unproved(machine: Machine) -> str | None:
    """Which of the three proofs is missing; None when all are there."""
    owned, files = machine.owned, machine.files
    deadline = owned.handle.get("deadline")
    if machine.name != machine_name(owned.job_id):
        return "its name is not that of its job"
    if isinstance(deadline, bool) or not isinstance(deadline, int | float):
        return "no deadline"
    if files is None:
        return "its store is none of ours"
    if files.launch is None or files.submission is None or files.submission.backend != machine.backend:
        return "no job folder that asked for it"
    return None


def _store(owned: Owned) -> str:
    """URL of the store that the machine's environment names."""
    return str(owned.handle.get("store", ""))
