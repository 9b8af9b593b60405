"""The container of every node but the first: joins each attempt that node 0 starts, until node 0 says it is over.

code = follow(machine)

It keeps no record but why it leaves, nodes/N.json. Node 0 writes container.json, checkpoints and the adapter, and its
trainer hands the checkpoint from which a run resumes to the others. A follower needs launch.json and data/ of the
store, and the model on its own disk.
"""

from __future__ import annotations

import errno
import shutil
import signal
import sys
import time
from collections.abc import Callable

from recipes.causes import EXIT_CODES, Cause
from recipes.job import ContainerState, LaunchSpec, NodeFailure, read_record
from scripts.container.fetch_model import fetch_model
from scripts.container.interruption import watch_interruption
from scripts.container.node_words import say
from scripts.container.pod_end import INTERRUPTED, START_SECONDS
from scripts.container.supervisor import end_leftovers, start_child, tail, watch_child
from scripts.container.verdict import End, Halt, explain_death
from scripts.errors import LorryError, NotFound, Problem, ProviderError
from scripts.job_folder import download_folder
from scripts.machine import Machine, Run, trainer_environment, trains_on_cpu
from scripts.models import making_commands, recipe_folder, recipe_problem

HEARD_SECONDS = 900.0
"For so long a node that cannot take part says so again and again, for a node 0 that may not have started yet."


def follow(machine: Machine) -> int:
    """Takes part until the job is over; its exit code, or INTERRUPTED when this machine is told to end before that."""
    (machine.work / "logs").mkdir(parents=True, exist_ok=True)
    end_leftovers(machine.work)
    follower = _Follower(machine)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: follower.interrupt())
    watch_interruption(machine.environment, follower.take)
    return follower.run()


class _Follower:
    """What this node knows of the job, and what it does about it."""

    def __init__(self, machine: Machine) -> None:
        self._machine, self._node, self._work = machine, machine.node, machine.work
        self._leader: ContainerState | None = None
        self._looked_at = float("-inf")
        self._deadline = machine.ends_at
        self._interrupted = False

    def interrupt(self) -> None:
        """The machine is told to end. Safe in a signal handler."""
        self._interrupted = True

    def take(self) -> None:
        """The provider takes this machine back: node 0 saves with this one, and the job goes on elsewhere."""
        self.interrupt()
        self._tell(0, "lost_rank", "its machine is taken back", is_taken=True)

    def run(self) -> int:
        """The exit code. What keeps this node from taking part is told to node 0."""
        try:
            return self._take_part()
        except LorryError as error:
            return self._give_up("unexpected", str(error))
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            return self._give_up("disk_full" if full else "unexpected", f"{type(error).__name__}: {error}")

    def _take_part(self) -> int:
        """Attempt after attempt. Raises LorryError and OSError."""
        spec = self._fetched_in_time()
        self._deadline = min(time.time() + spec.deadline_seconds, self._machine.ends_at)
        models, recipe = self._machine.models, spec.recipe
        fetch_model(self._machine.models_from, models, recipe)
        for command in making_commands(models, recipe):
            self._child("model", command, spec, self._halt)
        if problem := recipe_problem(models, recipe):
            return self._give_up("bad_base_model", problem)
        joined = 0
        while not (halt := self._halt()):
            if self._attempt() > joined:
                joined = self._attempt()
                self._join(joined, spec)
            time.sleep(self._machine.timing.poll)
        if halt == "interrupted":
            return INTERRUPTED
        if halt == "deadline" or self._leader is None:
            return self._leave("deadline", "the job did not end in its time")
        return self._leave(self._leader.cause, f"the job has ended: {self._leader.ended}")

    def _join(self, attempt: int, spec: LaunchSpec) -> None:
        _say(f"node {self._node.rank} joins attempt {attempt}")
        model = recipe_folder(self._machine.models, spec.recipe)
        run = Run(self._work, model, spec, attempt, self._machine.timing.grace, self._node)
        name = f"trainer-{attempt}"

        def tick() -> Halt | None:
            return self._halt() or ("no_progress" if self._attempt() != attempt else None)

        end = self._child(name, self._machine.train(run), spec, tick)
        said = tail(self._work / "logs" / f"{name}.log")
        death = explain_death(end, said, shutil.disk_usage(self._work).free)
        if end.code and end.halt is None and death.cause != "lost_rank":  # a lost rank is another node's
            self._tell(attempt, death.cause, death.detail)
        try:
            self._machine.store.write(f"{self._machine.job_id}/logs/{name}-node-{self._node.rank}.log", said.encode())
        except LorryError as error:
            _say(f"the log of node {self._node.rank} stays here: {error}")

    def _child(self, name: str, command: list[str], spec: LaunchSpec, tick: Callable[[], Halt | None]) -> End:
        environment = trainer_environment(self._machine.environment, trains_on_cpu(spec))
        child = start_child(command, environment, self._work / "logs" / f"{name}.log", self._work)
        return watch_child(child, tick, self._machine.timing, self._work)

    def _halt(self) -> Halt | None:
        """A look at what node 0 wrote last; a store that is silent changes nothing."""
        if time.monotonic() - self._looked_at > self._machine.timing.contact:
            self._looked_at = time.monotonic()
            try:
                written = self._machine.store.read(f"{self._machine.job_id}/container.json")
                self._leader = ContainerState.model_validate_json(written) if written else None
            except LorryError:
                pass
        if self._leader and self._leader.ended:
            return "stop"
        if time.time() > self._deadline:
            return "deadline"
        return "interrupted" if self._interrupted else None

    def _attempt(self) -> int:
        """The attempt that node 0 runs now; 0 when it runs none."""
        attempts = self._leader.attempts if self._leader else ()
        return attempts[-1].number if attempts and attempts[-1].ended_at is None else 0

    def _fetched_in_time(self) -> LaunchSpec:
        """A store that is silent at the start is asked again: the word of this node would be the end of the job."""
        give_up = time.monotonic() + START_SECONDS
        while True:
            try:
                return self._fetched()
            except ProviderError as error:
                if time.monotonic() > give_up or self._halt():
                    raise
                _say(f"node {self._node.rank}: {error}")
                time.sleep(self._machine.timing.contact)

    def _fetched(self) -> LaunchSpec:
        job, store = self._machine.job_id, self._machine.store
        store.get_file(f"{job}/launch.json", self._work / "launch.json")
        download_folder(store, f"{job}/data", self._work / "data")
        spec = read_record(LaunchSpec, self._work / "launch.json")
        if spec is None or not (self._work / "data" / "train.jsonl").is_file():
            raise NotFound(Problem(f"{job}/data/train.jsonl", "no such file", "launch the job again"))
        return spec

    def _give_up(self, cause: Cause, sentence: str) -> int:
        """Says so until node 0 has ended the job, or for HEARD_SECONDS."""
        _say(f"node {self._node.rank} cannot take part: {sentence}")
        give_up = time.monotonic() + HEARD_SECONDS
        while time.monotonic() < give_up and not self._halt():
            self._tell(0, cause, sentence)
            time.sleep(self._machine.timing.contact)
        return self._leave(cause, sentence)

    def _tell(self, attempt: int, cause: Cause, sentence: str, *, is_taken: bool = False) -> None:
        rank, now = self._node.rank, time.time()
        word = NodeFailure(node=rank, attempt=attempt, cause=cause, sentence=sentence, at=now, is_taken=is_taken)
        say(self._machine.store, self._machine.job_id, word)

    def _leave(self, cause: Cause | None, sentence: str) -> int:
        _say(f"node {self._node.rank}: {sentence}")
        self._machine.end()
        return EXIT_CODES[cause] if cause else 0


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
