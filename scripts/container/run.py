"""What runs first on any machine that trains: fetch, supervise the trainer, prove, bring home, end the machine.

python -m scripts.container --store file:///srv/jobs --job bicycle-care-1

Started again, it goes on where it was: attempts and deadline count from the first start, and a job that has ended
stays ended. It exits with 0 when the job is completed, with the cause's exit code when it is not, and with 143 when
the machine was told to end before the job was over.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from recipes.causes import ADVICE, EXIT_CODES
from recipes.job import JOB_ID, Attempt, ContainerState, File, LaunchSpec, Proof, Result, Status, read_record
from scripts.adapter import MANIFEST, write_manifest
from scripts.container.fetch_model import fetch_model
from scripts.container.follower import follow
from scripts.container.gpu_probe import Idleness
from scripts.container.guard import Guard, Left, Tick
from scripts.container.interruption import watch_interruption
from scripts.container.logbook import Logbook
from scripts.container.node_words import NodeWords
from scripts.container.nodes import node_of
from scripts.container.pod_end import INTERRUPTED
from scripts.container.supervisor import Patience, end_leftovers, tail
from scripts.container.verdict import (
    FULL_DISK_BYTES,
    Death,
    End,
    Ending,
    Halt,
    cause_of_code,
    explain_death,
    judge,
    sentence_of,
)
from scripts.container.work_folder import newest_checkpoint, open_work_folder
from scripts.errors import Conflict, InputError, LorryError, NotFound, Problem, ProviderError
from scripts.job_lock import take_lock
from scripts.machine import Machine, Run, loading_seconds, nothing, trainer_environment, trains_on_cpu
from scripts.models import making_commands, recipe_folder, recipe_problem
from scripts.settings import read_settings
from scripts.state import PAUSES_FREE, hourly_usd
from scripts.store import FileStore, open_store

INTERRUPTION = "the machine is told to end before the job is over; started again, it goes on from its newest checkpoint"
PROOF_TRIES = 2
DELIVERY_SECONDS = 900.0  # the most an ended job may take to bring its logs and checkpoint home


def machine_here(store_url: str, job_id: str, work: Path | None, end: Callable[[], None] = nothing) -> Machine:
    """This machine, as its environment describes it. Raises InputError."""
    settings = read_settings({**os.environ, "LORRY_STORE": store_url}, Path.cwd())
    store = open_store(settings.store)
    if not JOB_ID.fullmatch(job_id):
        raise InputError(Problem("--job", repr(job_id), "3 to 63 lower-case letters, digits and single hyphens"))
    home = store.root / job_id if isinstance(store, FileStore) and node_of(os.environ).leads else None
    work = work.resolve() if work else home or Path(tempfile.mkdtemp(prefix="lorry-"))
    return Machine(store, job_id, work, settings.models, os.environ, end=end)


def run_container(machine: Machine) -> int:
    """Runs the container of one job until job or machine ends; the exit code. Raises Conflict when another is at it."""
    if not machine.node.leads:
        return follow(machine)
    (machine.work / "logs").mkdir(parents=True, exist_ok=True)
    with take_lock(machine.work) as mine:
        if not mine:
            raise Conflict(Problem(str(machine.work), "another container is at work on this job", "let it finish"))
        container = _Container(machine)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: container.guard.interrupt())
        watch_interruption(machine.environment, container.guard.take)
        return container.run()


class _Container:
    """The stages of one job on this machine, and the stops that may end each of them."""

    def __init__(self, machine: Machine) -> None:
        self._machine, self._work, self._timing = machine, machine.work, machine.timing
        self._folder = open_work_folder(machine.store, machine.job_id, machine.work, machine.timing.contact)
        now = time.time()
        fresh = ContainerState(job_id=machine.job_id, stage="fetching", updated_at=now, started_at=now, pid=os.getpid())
        self._book = Logbook(machine.work, fresh, machine.timing.heartbeat)
        self._came_from_elsewhere = False
        self.guard = Guard(self._folder, self._book, machine.timing)
        contact = machine.timing.contact
        self._nodes = NodeWords(machine.store, machine.job_id, machine.node, contact, self.guard.take)

    def run(self) -> int:
        """Goes all the way; whatever happens, container.json says how it ended."""
        recorded = self._machine.store.read(f"{self._machine.job_id}/container.json")  # silent store: nothing has begun
        has_ended = False
        ending: Ending | None = Ending("completed")
        try:
            has_ended = self._resume(recorded)
            if not has_ended:
                self._go()
        except Left as left:
            ending = left.ending
        except Exception as error:
            ending = self._unforeseen(error)
        if has_ended:
            self._machine.end()  # it may be on again because its first end failed
            return 0
        return self._leave(ending)

    def _resume(self, recorded: bytes | None) -> bool:
        """Takes up the record of an earlier start, here or in the store; True when the job has ended already."""
        local = read_record(ContainerState, self._work / "container.json")
        remote = ContainerState.model_validate_json(recorded) if recorded else None
        self._came_from_elsewhere = bool(remote and (local is None or local.updated_at < remote.updated_at))
        if known := remote if self._came_from_elsewhere else local:
            self._book.take_up(known)
        if self._book.state.ended:
            self._book.say(f"the job has ended already: {self._book.state.ended}")
            if remote is None or remote.ended is None:
                self._bring_home()
            return True
        end_leftovers(self._work)
        self._book.note(stage="fetching", taken_at=None)
        self._book.say(f"process {os.getpid()} takes the job, {len(self._book.state.attempts)} attempts so far")
        return False

    def _go(self) -> None:
        if self._machine.store.read(f"{self._machine.job_id}/adapter/{MANIFEST}") is not None:
            return
        if (self._work / "adapter" / MANIFEST).exists():
            return self._carry(self.guard.beat_within(DELIVERY_SECONDS))
        self.guard.aside(lambda: self._folder.fetch(self._came_from_elsewhere), self.guard.tick)
        spec = self._spec()
        if spec.backend in PAUSES_FREE:
            self._book.leave_out_the_wait()
        left = spec.deadline_seconds - self._book.machine_seconds
        self.guard.set_deadline(min(left, self._machine.ends_at - time.time()))
        self._folder.start()
        model = self._model(spec)
        result = self._train(spec, model)
        proof = self._prove(spec, model, result)
        self._store(spec, result, proof)

    def _spec(self) -> LaunchSpec:
        spec = read_record(LaunchSpec, self._work / "launch.json")
        for name in ("launch.json", "data/train.jsonl"):
            if not (self._work / name).is_file():
                raise NotFound(Problem(str(self._work / name), "no such file", "launch the job again"))
        assert spec is not None
        if spec.job_id != self._machine.job_id:
            raise InputError(Problem("launch.json", f"of job {spec.job_id}", f"that of {self._machine.job_id}"))
        return spec

    def _model(self, spec: LaunchSpec) -> Path:
        models, recipe = self._machine.models, spec.recipe
        fetch = partial(fetch_model, self._machine.models_from, models, recipe)
        self.guard.aside(fetch, self.guard.tick_within(loading_seconds(spec)))
        for command in making_commands(models, recipe):
            self.guard.heed(self._child("model", command, spec, self.guard.tick_within(0.0)).halt)
        if problem := recipe_problem(models, recipe):
            raise Left(Ending("failed", "bad_base_model", problem))
        return recipe_folder(models, recipe)

    def _train(self, spec: LaunchSpec, model: Path) -> Result:
        """Attempts, until one is completed. An attempt that the container did not outlive is judged first."""
        ending: Ending | None = None
        if self._book.state.attempts:
            ending = self._close_attempt(None)
        while ending is None:
            ending = self._close_attempt(self._attempt(spec, model))
        result = self._result()
        if ending.outcome != "completed" or result is None:
            raise Left(ending)
        return result

    def _attempt(self, spec: LaunchSpec, model: Path) -> End:
        number = len(self._book.state.attempts) + 1
        resumed = newest_checkpoint(self._work)
        attempt = Attempt(number=number, started_at=time.time(), resumed_from=resumed)
        self._book.note(stage="loading", attempts=(*self._book.state.attempts, attempt))
        self._book.say(f"attempt {number} starts" + (f" from {resumed}" if resumed else ""))
        began, loading = time.monotonic(), loading_seconds(spec)
        patience = Patience(number, self._timing.no_progress, loading, began)
        idleness = Idleness(self._machine.gpus_busy, self._timing.idle + loading, began)

        def tick() -> Halt | None:
            status, now = self._status(number), time.monotonic()
            stuck = patience.exhausted(status, now) or idleness.exhausted(now)
            halt: Halt | None = "node_failed" if self._nodes.failure(number) else "no_progress" if stuck else None
            return self.guard.tick(status) or halt

        run = Run(self._work, model, spec, number, self._timing.grace, self._machine.node)
        return self._child(f"trainer-{number}", self._machine.train(run), spec, tick)

    def _close_attempt(self, end: End | None) -> Ending | None:
        """Records how the last attempt ended and says what follows; `end` is None when nobody saw it end."""
        *earlier, last = self._book.state.attempts
        if last.ended_at is None:
            status = self._status(last.number)
            ours = end is None or end.halt == "interrupted"
            code, step = None if ours or end is None else end.code, status.step if status else 0
            last = last.model_copy(update={"ended_at": time.time(), "exit_code": code, "last_step": step})
            self._book.note(attempts=(*earlier, last))
            self._book.say(f"attempt {last.number} ended at step {last.last_step} with exit code {last.exit_code}")
        if end is not None:
            self.guard.heed(end.halt)
        death = self._death(end or End(last.exit_code or -signal.SIGKILL, None), f"trainer-{last.number}")
        result = self._result()
        if result is None or result.outcome != "completed":  # a completed one needs no word of another node
            death = self._nodes.death(last.number, death, may_come=end is not None)
            if self._nodes.has_taken:
                self.guard.heed(self.guard.tick())
            if end is not None and end.halt == "node_failed":
                result = None  # it only says that it was told to end
        return judge((*earlier, last), result, death, newest_checkpoint(self._work))

    def _prove(self, spec: LaunchSpec, model: Path, result: Result) -> Proof:
        """The proof of the very adapter that `result` names; an unexplained death of the prover is tried again."""
        self._book.note(stage="proving")
        run = Run(self._work, model, spec, result.attempt, self._timing.grace)
        end = End(0, None)
        for _ in range(PROOF_TRIES):
            proof = self._proof(result)
            if proof is not None and proof.passed:
                return proof
            end = self._child("prove", self._machine.prove(run), spec, self.guard.tick_within(loading_seconds(spec)))
            self.guard.heed(end.halt)
            proof = self._proof(result)
            self._book.say(f"the prover ended with exit code {end.code}")
            if proof is not None and proof.passed and end.code == 0:
                return proof
            if cause := cause_of_code(end.code):
                refused = self._read(Proof, "proof.json")
                raise Left(Ending("failed", cause, refused.sentence if refused else ADVICE[cause]))
        death = self._death(end, "prove")
        raise Left(Ending("failed", death.cause, f"the adapter could not be proved: {sentence_of(death)}"))

    def _store(self, spec: LaunchSpec, result: Result, proof: Proof) -> None:
        """Everything home first, the manifest last; once it is written, no stop is heeded any more."""
        self._book.note(stage="storing")
        self._carry(self.guard.tick)
        price = hourly_usd(spec)
        hours = self._book.machine_seconds / 3600
        cost = None if price is None else round(price * hours, 4)
        image = self._machine.environment.get("LORRY_TRAINER_IMAGE")  # whoever rents a machine says what runs there
        write_manifest(self._work, spec, result, proof, cost_usd=cost, now=time.time(), image=image)
        self._carry(self.guard.beat_within(DELIVERY_SECONDS))

    def _carry(self, tick: Tick) -> None:
        """Hours of training outwait a network that is down, as long as `tick` lets them."""
        while True:
            try:
                return self.guard.aside(self._folder.deliver, tick)
            except ProviderError as error:
                self._book.say(f"the store does not take it, trying again: {error}")
                self.guard.aside(lambda: time.sleep(self._timing.contact), tick)

    def _leave(self, ending: Ending | None) -> int:
        """Brings home what there is, writes how it ended, ends the machine."""
        self._book.say(f"{ending.outcome}: {ending.sentence}".rstrip(": ") if ending else INTERRUPTION)
        self._bring_home()
        if ending is None:
            return INTERRUPTED
        self._book.note(stage="done", ended=ending.outcome, cause=ending.cause, sentence=ending.sentence)
        self._bring_home()
        self._machine.end()
        return EXIT_CODES[ending.cause] if ending.cause else 0

    def _bring_home(self) -> None:
        try:
            self.guard.aside(self._folder.deliver, self.guard.beat_within(DELIVERY_SECONDS))
        except (LorryError, OSError, Left) as error:
            self._book.say(f"not everything could be brought home: {error}")

    def _unforeseen(self, error: Exception) -> Ending:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or shutil.disk_usage(self._work).free < FULL_DISK_BYTES:
            return Ending("failed", "disk_full", ADVICE["disk_full"])
        if isinstance(error, LorryError):
            return Ending("failed", "unexpected", str(error))
        self._book.say("".join(traceback.format_exception(error)))
        return Ending("failed", "unexpected", f"{ADVICE['unexpected']} ({type(error).__name__}: {error})")

    def _child(self, name: str, command: list[str], spec: LaunchSpec, tick: Tick) -> End:
        environment = trainer_environment(self._machine.environment, trains_on_cpu(spec))
        return self.guard.child(name, command, environment, tick)

    def _death(self, end: End, log: str) -> Death:
        return explain_death(end, tail(self._work / "logs" / f"{log}.log"), shutil.disk_usage(self._work).free)

    def _status(self, attempt: int) -> Status | None:
        status = self._read(Status, "status.json")
        return status if status and status.attempt == attempt else None

    def _result(self) -> Result | None:
        """What the last attempt wrote; one of an earlier attempt, or of an adapter lost with its machine, is none."""
        result, number = self._read(Result, "result.json"), self._book.state.attempts[-1].number
        if result is None or result.job_id != self._machine.job_id or result.attempt != number:
            return None
        return result if all((self._work / "adapter" / n).is_file() for n in result.adapter_sha256) else None

    def _proof(self, result: Result) -> Proof | None:
        proof = self._read(Proof, "proof.json")
        return proof if proof and proof.adapter_sha256 == result.adapter_sha256 else None

    def _read(self, model: type[File], name: str) -> File | None:
        """A file of the trainer; one that a full disk cut short counts as not written."""
        try:
            return read_record(model, self._work / name)
        except (InputError, OSError):
            return None
