"""A world on a fake clock: launchers that die, an EC2 that fails, machines that are taken back in two minutes.

world = Ec2World(seed, None, folder); ended = world.live(); world.found       # every promise that was broken
"""

from __future__ import annotations

import random
from typing import Any

from scripts.backends.base import Backend, Observation
from scripts.backends.ec2 import Ec2Backend
from scripts.cost import settle
from scripts.fake_runpod.clock import Clock
from scripts.job_folder import read_job
from scripts.state import JobState, job_state, overdue
from scripts.store import FileStore, open_store
from tests.ec2.conftest import ENVIRONMENT, ec2_spec
from tests.ec2.local_ec2 import BOTH, Account, Fault, Machine
from tests.runpod.world import EPOCH, TICK_SECONDS, Killed, ReplayContainer, World, script_of

TOKEN_SECRET = "CANARY-token-secret"
TYPE = "p5.4xlarge"
FULL_SECONDS = 600.0
"After that a full zone has room again."
WAIT_SECONDS = 600.0
"For its launch file a machine waits so long, then it ends itself."


class Ec2World(World):
    """One job, its launchers, its EC2. The container is the one that plays in Pods, on a machine of its own."""

    def __post_init__(self) -> None:
        self.script, self.clock = script_of(self.seed), Clock(EPOCH)
        chance = random.Random(self.seed + 1_000_000)
        store = open_store((self.folder / "store" / "clients" / "acme" / "jobs").as_uri())
        assert isinstance(store, FileStore)
        self.store = store
        self.account = Account(self.clock, on_start=self.started)
        self.account.faults += [_fault(chance) for _ in range(chance.choice([0, 1, 2, 4]))]
        self.account.hidden_seconds = chance.choice([0.0, 5.0, 30.0])
        self.market = chance.choice(["spot", "on-demand"])
        self.account.spot_usd = {(TYPE, zone): chance.choice([2.0, 3.0, 3.0]) for zone in BOTH}
        self.account.no_capacity = {(TYPE, zone) for zone in BOTH if chance.random() < 0.15}
        self.blows = [(chance.uniform(0, 900), chance.choice(_BLOWS)) for _ in range(chance.choice([0, 0, 1, 2, 3]))]
        deadline, steps = self.script.deadline_seconds, self.script.steps
        self.spec = ec2_spec(store.url, deadline_seconds=deadline, total_steps=steps)
        self.deaths = list(self.script.deaths)
        self.running: dict[str, Ec2Container | None] = {}
        self.striking: list[tuple[float, str, str]] = []
        self.hung: set[str] = set()
        "Machines in which nothing happens any more."

    def started(self, machine: Machine) -> None:
        """A machine has booted; what befalls it is drawn for each anew."""
        instance = machine.row["InstanceId"]
        self.running[instance] = None
        if self.blows:
            after, what = self.blows.pop(0)
            self.striking.append((self.clock.now() + after, what, instance))

    def pass_time(self, seconds: float) -> None:
        """Everything that happens in so many seconds."""
        until = self.clock.now() + seconds
        while (left := until - self.clock.now()) > 0:
            self.clock.jump(min(TICK_SECONDS, left))
            self.ticks += 1
            jump = self.script.jumps.get(self.ticks, 0.0)
            self.clock.jump(jump)
            until += jump
            if self.clock.now() > EPOCH + FULL_SECONDS:
                self.account.no_capacity.clear()
            self.account.advance()
            for instance in list(self.running):
                self.go_on(instance)
            for blow in [blow for blow in self.striking if self.clock.now() >= blow[0]]:
                self.striking.remove(blow)
                self.strike(*blow[1:])
            self.look()

    def go_on(self, instance: str) -> None:
        """What the machine's user data and its container do in this tick."""
        machine, container = self.account.machines[instance], self.running[instance]
        told = self.account.objects.get(f"machines/{ENVIRONMENT['LORRY_EC2_ROLE_ID']}:{instance}/launch.env")
        if machine.ended_at is not None:
            del self.running[instance]
        elif instance in self.hung:
            return
        elif container is None and told is not None:
            environment = dict(line.split("=", 1) for line in told.decode().splitlines())
            self.running[instance] = Ec2Container(self, self.folder / instance, environment)
        elif container is None and self.clock.now() - machine.created_at > WAIT_SECONDS:
            self.account.end(instance, "Client.InstanceInitiatedShutdown")
        elif container is not None and container.code is None:
            container.act()
        elif container is not None and self.script.keys_work:  # the end of the user data is the end of the machine
            self.account.end(instance, "Client.InstanceInitiatedShutdown")

    def strike(self, what: str, instance: str) -> None:
        machine, container = self.account.machines[instance], self.running.get(instance)
        if machine.ended_at is not None:
            return
        if what == "notice":
            machine.noticed_at = self.clock.now()
            if container is not None:
                container.end()
        elif what == "taken":
            self.account.end(instance, "Server.SpotInstanceTermination")
        elif what == "broken":
            self.account.end(instance, "Server.InternalError")
        elif what == "hang":
            self.hung.add(instance)
        elif container is not None:
            container.end(at_once=True)

    def look(self) -> None:
        """What must hold at every moment."""
        if len(self.account.alive()) > 1:
            self.found.append(f"{len(self.account.alive())} machines at once")
        self.look_at_the_adapter()
        self.look_at_the_stop(bool(self.account.alive()))

    def launcher(self) -> Backend:
        return self.backend(self.deaths.pop(0) if self.deaths else "never")

    def backend(self, moment: str) -> Ec2Backend:
        door = {"LORRY_PUBLIC_URL": "https://lorry.example", "LORRY_TOKEN_SECRET": TOKEN_SECRET}
        return MortalEc2(ENVIRONMENT | door | {"LORRY_EC2_MARKET": self.market}, moment, self)

    def watch(self, backend: Backend) -> JobState:
        """Who watches must follow a machine that is taken back with another one, while the job may go on."""
        state = super().watch(backend)
        last = max(self.account.machines.values(), key=lambda machine: machine.created_at)
        is_over = overdue(read_job(self.store, "job-1"), Observation("gone"), self.clock.now())
        if state.state == "lost" and last.noticed_at is not None and not is_over:
            self.found.append("a notice was not followed by another machine")
        return state

    def calm(self) -> Backend:
        self.account.faults.clear()
        return self.backend("never")

    def machines_left(self) -> bool:
        return bool(self.account.alive())

    def broke_ledger(self) -> bool:
        """Whether the settlement is not what the machines did cost; EC2's own stamps are whole seconds."""
        backend, files = self.backend("never"), read_job(self.store, "job-1")
        done = settle(self.store, files, job_state(files, None, self.clock.now()), backend.charges, self.clock.now())
        usd = done.usd if done is not None else 0.0
        return abs(usd - self.account.total()) > 0.002 * (1 + len(self.account.machines))

    def leaks(self) -> list[str]:
        files = [(str(p), p.read_bytes()) for p in self.store.root.rglob("*") if p.is_file()]
        seen = [*files, ("a request", repr(self.account.log).encode())]
        return [where for where, data in seen if TOKEN_SECRET.encode() in data]


class Ec2Container(ReplayContainer):
    """The container on a machine of EC2: it hears notices, and its exit is the machine's end."""

    def end(self, *, at_once: bool = False) -> None:
        if not at_once:
            self.note(taken_at=self.world.clock.now())
        super().end(at_once=at_once)

    def end_pod(self) -> None:
        self.code = 0


class MortalEc2(Ec2Backend):
    """The backend of a launcher that is killed before or after its create, before it handed over."""

    def __init__(self, environment: dict[str, str], moment: str, world: Ec2World) -> None:
        account = world.account
        super().__init__(environment, now=world.clock.now, sleep=world.pass_time, client=account.client)
        self.moment, self.world = moment, world

    def submit(self, spec: Any, request: Any) -> Any:
        """A second launcher comes right after this one; it must find the same machine."""
        handle = super().submit(spec, request)
        again = super().submit(spec, request)
        if again["instances"] != handle["instances"] and handle["instances"][0] in self.world.account.alive():
            self.world.found.append("a second launcher has another machine")
        return handle

    def _bucket(self, spec: Any) -> str:
        return "bucket"

    def _create(self, *given: Any) -> Any:
        if self.moment == "before":
            raise Killed
        made = super()._create(*given)
        if self.moment == "after":
            raise Killed
        return made


_BLOWS = ("notice", "notice", "taken", "broken", "kill", "hang")
_TIMES = {"run_instances": 4, "describe_instances": 3, "terminate_instances": 3, "put_object": 1}


def _fault(chance: random.Random) -> Fault:
    action = chance.choice([*_TIMES, "run_instances"])
    codes = ["", "InternalError", "RequestLimitExceeded"]
    if action == "run_instances":
        codes += ["InsufficientInstanceCapacity", "VcpuLimitExceeded"]
    code = chance.choice(codes)
    done = code in ("", "InternalError") and chance.random() < 0.5
    return Fault(action, code, chance.randint(1, _TIMES[action]), carried_out=done)
