"""The machines behind the Pods of the local Runpod: they place, start, restart and end containers by the clock.

host = Host(Path("pods"), ProcessRunner()); host.advance(account)     # as often as one likes

A Pod provisions, starts, runs. A container that exits is started again, as the platform does; only who ends the Pod
ends it. `mishaps` says what goes wrong on the way.
"""

from __future__ import annotations

import re
import secrets
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from scripts.fake_runpod.account import Account
from scripts.fake_runpod.clock import seconds_of
from scripts.fake_runpod.clusters import variables_of
from scripts.fake_runpod.processes import Runner, Running

Json = dict[str, Any]
_SECRET = re.compile(r"\{\{\s*RUNPOD_SECRET_([^\s{}]+)\s*\}\}")


@dataclass
class Mishap:
    """What befalls the next `times` Pods whose name matches, so many seconds after the Pod began to run.

    stuck: it provisions for ever. error: its container cannot be started. vanish: the machine is lost with all that was
    on it. kill: the container dies and is started again. stop: the platform stops it, as for want of money.
    """

    kind: Literal["stuck", "error", "vanish", "kill", "stop"]
    after_seconds: float = 0.0
    name: str = "."
    times: int = 1


def mishap_for(mishaps: list[Mishap], name: str) -> Mishap | None:
    """The mishap that is due for a machine of this name, used up by one."""
    due = next((m for m in mishaps if m.times > 0 and re.search(m.name, name)), None)
    if due is not None:
        due.times -= 1
    return due


def filled_in(account: Account, variables: Json, mounts: dict[str, str], folder: Path) -> dict[str, str]:
    """The variables of a container: secrets in the place of references, folders below `folder` in that of volumes.

    mounts: volume id -> path. A secret that does not exist leaves its reference as it stands, as on the platform.
    """
    given = {
        name: _SECRET.sub(lambda found: account.secret_values.get(found[1], found[0]), value)
        for name, value in variables.items()
    }
    for volume_id, path in mounts.items():
        volume = folder / "volumes" / volume_id
        volume.mkdir(parents=True, exist_ok=True)
        given = {k: re.sub(rf"^{re.escape(path)}(?=/|$)", str(volume), v) for k, v in given.items()}
    return given


@dataclass
class Machine:
    """What one Pod runs on."""

    pod: Json
    key: str
    status: str
    at: float
    "When the status began."
    mishap: Mishap | None
    started_at: float | None = None
    running: Running | None = None
    restarts: int = 0


@dataclass
class Host:
    """All machines. `url`: where containers find the control plane, which the real ones need not be told."""

    folder: Path
    runner: Runner
    url: str = ""
    provisioning_seconds: float = 0.0
    starting_seconds: float = 0.0
    restart_seconds: float = 0.2
    shows_restarts: bool = False
    "Whether a Pod shows STARTING while its container is started again; the contract does not say."
    mishaps: list[Mishap] = field(default_factory=list)
    machines: dict[str, Machine] = field(default_factory=dict)
    ending: list[Running] = field(default_factory=list)

    def pod_of_key(self, key: str) -> str | None:
        """The Pod that this key may read and end; None for a key of no Pod."""
        return next((pod_id for pod_id, m in self.machines.items() if secrets.compare_digest(m.key, key)), None)

    def advance(self, account: Account) -> None:
        """Brings every machine to where it is by now."""
        self.ending = [running for running in self.ending if running.exit_code() is None]
        pods = account.held["pods"]
        for pod_id in [pod_id for pod_id in self.machines if pod_id not in pods]:
            self._release(self.machines.pop(pod_id))
        for pod_id, pod in pods.items():
            if pod_id not in self.machines:
                self.machines[pod_id] = self._take(pod, account)
            self._step(account, self.machines[pod_id])
        for pod_id in [pod_id for pod_id, m in self.machines.items() if m.status == "TERMINATED"]:
            account.delete("pods", pod_id)

    def close(self) -> None:
        """Ends every container at once."""
        for machine in self.machines.values():
            if machine.running is not None:
                machine.running.end(at_once=True)
        for running in self.ending:
            running.end(at_once=True)

    def _take(self, pod: Json, account: Account) -> Machine:
        due = mishap_for(self.mishaps, pod["name"])
        pod["life"] = ["PROVISIONING"]
        return Machine(pod, f"pod-{secrets.token_hex(16)}", "PROVISIONING", seconds_of(pod["createdAt"]), due)

    def _step(self, account: Account, machine: Machine) -> None:
        now = account.clock.now()
        asked = machine.pod["life"][0]
        if asked != machine.status:  # somebody stopped, started or restarted it
            self._release(machine)
            self._move(account, machine, "PROVISIONING" if asked == "RUNNING" else asked)
        has_place = not self._is("stuck", machine) and now - machine.at >= self.provisioning_seconds
        if machine.status == "PROVISIONING" and has_place:
            self._move(account, machine, "STARTING")
        if machine.status == "STARTING" and now - machine.at >= self.starting_seconds:
            self._start(account, machine)
        elif machine.status == "RUNNING":
            self._look(account, machine)

    def _look(self, account: Account, machine: Machine) -> None:
        self._listen(account, machine)
        if self._due(account, machine):
            return
        running = machine.running
        if running is not None and (code := running.exit_code()) is not None:
            self._listen(account, machine)
            account.say(machine.pod["id"], "system", f"the container exited with {code}; starting it again")
            machine.running, machine.at = None, account.clock.now()
            if self.shows_restarts:
                return self._move(account, machine, "STARTING")
        if machine.running is None and account.clock.now() - machine.at >= self.restart_seconds:
            machine.restarts += 1
            self._start(account, machine)

    def _due(self, account: Account, machine: Machine) -> bool:
        """Whether its mishap struck now."""
        mishap, started = machine.mishap, machine.started_at
        if mishap is None or started is None or account.clock.now() - started < mishap.after_seconds:
            return False
        strike: dict[str, Callable[[], None]] = {
            "vanish": lambda: self._end(account, machine, "TERMINATED"),
            "stop": lambda: self._end(account, machine, "EXITED"),
            "kill": lambda: machine.running.end(at_once=True) if machine.running else None,
        }
        if mishap.kind not in strike:
            return False
        machine.mishap = None
        strike[mishap.kind]()
        return mishap.kind != "kill"

    def _start(self, account: Account, machine: Machine) -> None:
        pod = machine.pod
        try:
            if self._is("error", machine):
                raise ValueError("the image could not be started")
            environment = self._environment(account, machine)
            folder = self.folder / pod["id"]
            machine.running = self.runner.start(pod["id"], shlex.split(pod["args"]), environment, folder)
        except ValueError as error:
            account.say(pod["id"], "system", str(error))
            self._move(account, machine, "ERROR")
            return
        machine.started_at = machine.started_at or account.clock.now()
        if machine.status != "RUNNING":
            pod["startedAt"] = account.clock.stamp()
            self._move(account, machine, "RUNNING")

    def _environment(self, account: Account, machine: Machine) -> dict[str, str]:
        """What the platform puts into a container."""
        pod = machine.pod
        gpus = str((pod.get("gpu") or {}).get("count", 0))
        own = {"RUNPOD_POD_ID": pod["id"], "RUNPOD_DC_ID": pod["dataCenterId"], "RUNPOD_GPU_COUNT": gpus}
        own |= {"RUNPOD_API_KEY": machine.key, "RUNPOD_API_BASE_URL": self.url, "RUNPOD_POD_HOSTNAME": pod["id"]}
        mounts = {mount["volumeId"]: mount["path"] for mount in pod["mounts"].get("network", [])}
        if mounts:
            own["RUNPOD_VOLUME_ID"] = next(iter(mounts))
        return {**filled_in(account, pod["env"], mounts, self.folder), **own, **variables_of(account, pod)}

    def _listen(self, account: Account, machine: Machine) -> None:
        for line in machine.running.lines() if machine.running else ():
            account.say(machine.pod["id"], "container", line)

    def _end(self, account: Account, machine: Machine, status: str) -> None:
        if machine.running is not None:
            machine.running.end(at_once=True)
            machine.running = None
        self._move(account, machine, status)

    def _release(self, machine: Machine) -> None:
        if machine.running is not None:
            machine.running.end()
            self.ending.append(machine.running)
            machine.running = None

    def _move(self, account: Account, machine: Machine, status: str) -> None:
        machine.status, machine.at = status, account.clock.now()
        machine.pod["life"] = [status]
        account.meter_pod(machine.pod, status)
        account.say(machine.pod["id"], "system", f"the Pod is {status}")

    @staticmethod
    def _is(kind: str, machine: Machine) -> bool:
        return machine.mishap is not None and machine.mishap.kind == kind
