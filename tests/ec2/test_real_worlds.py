"""Five machines of EC2 that train for real while something goes wrong: a verified adapter, and all of it billed."""

from __future__ import annotations

import http.server
import io
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.backends.aws import aws_client
from scripts.backends.ec2 import Ec2Backend
from scripts.cost import settle
from scripts.errors import ProviderError
from scripts.fake_runpod.clock import Clock
from scripts.job_folder import read_job
from scripts.launch import launch
from scripts.pull import pull
from scripts.state import JobState
from scripts.store import open_store
from scripts.watch import watch
from tests.ec2 import local_ec2
from tests.ec2.conftest import ENVIRONMENT
from tests.ec2.local_ec2 import BOTH, Account, Fault, Machine
from tests.ec2.test_real_trainer import STORE, Hardware, aws  # noqa: F401
from tests.runpod.test_real_trainer import smoke_spec
from tests.runpod.test_real_worlds import (
    model,  # noqa: F401
    trainers_of,
)

LAUNCHES = 10
JUMP_SECONDS = 400.0
TYPE = "p5.4xlarge"
BLOWS = {
    "the answer to a create is lost": [Fault("run_instances", "", carried_out=True)],
    "requests are throttled and a zone is full": [
        Fault("run_instances", "RequestLimitExceeded", 2),
        Fault("describe_instances", "RequestLimitExceeded", 2),
    ],
    "spot gives notice": [],
    "the machine is taken without a word": [],
    "the clock jumps": [],
}
TAKEN = ("spot gives notice", "the machine is taken without a word")


class Metadata:
    """The metadata service of every machine: whether it is taken back in two minutes."""

    def __init__(self) -> None:
        self.notice = False
        me = self

        class Service(http.server.BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                self.say(200)

            def do_GET(self) -> None:
                self.say(200 if me.notice else 404)

            def say(self, status: int) -> None:
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                return

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Service)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


class RealEc2(Hardware):
    """An EC2 of our own whose machines are processes; they read launch files and jobs from a real S3 of moto."""

    def __init__(self, folder: Path, model: Path) -> None:  # noqa: F811
        super().__init__(folder)
        self.clock, self.metadata, self.model = Clock(), Metadata(), model
        self.account = Account(self.clock, on_start=self.start, spot_usd={(TYPE, zone): 2.0 for zone in BOTH})
        self.pending = ""

    def client(self, service: str) -> Any:
        return self.account.client(service) if service == "ec2" else aws_client(service)

    def start(self, machine: Machine) -> None:
        instance = machine.row["InstanceId"]
        self.metadata.notice = False
        self.booted[instance] = self.boot(instance)
        shutil.copytree(self.model, self.folder / instance / "nvme" / "models" / self.model.name)

    def pass_time(self, seconds: float) -> None:
        """What happens meanwhile, in the thread of who waits."""
        time.sleep(min(seconds, 0.5))
        self.account.advance()
        assert len(self.account.alive()) <= 1
        for instance in self.account.alive():
            process = self.booted.get(instance)
            if process is not None and process.poll() is not None:
                self.account.end(instance, "Client.InstanceInitiatedShutdown")
            elif process is not None and self.pending and trainers_of(self.work(instance)):
                self.strike(instance)

    def work(self, instance: str) -> Path:
        return self.folder / instance / "nvme" / "real-1"

    def strike(self, instance: str) -> None:
        blow, self.pending = self.pending, ""
        if blow == "spot gives notice":
            self.account.machines[instance].noticed_at = self.clock.now()
            self.metadata.notice = True
        elif blow == "the machine is taken without a word":
            for pid in trainers_of(self.work(instance)):
                os.kill(pid, signal.SIGKILL)
            os.killpg(self.booted[instance].pid, signal.SIGKILL)
            self.account.end(instance, "Server.SpotInstanceTermination")
        elif blow == "the clock jumps":
            self.clock.jump(JUMP_SECONDS)


@pytest.fixture
def cloud(
    aws: dict[str, str],  # noqa: F811
    model: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[RealEc2]:
    monkeypatch.setattr(local_ec2, "BOOT_SECONDS", 0.5)
    made = RealEc2(tmp_path / "hardware", model)
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", made.metadata.url)
    yield made
    made.metadata.server.shutdown()
    for process in made.booted.values():
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def live(cloud: RealEc2, data: Path, settings: dict[str, str]) -> tuple[JobState, Ec2Backend]:
    """From the first launch to the end; who watches asks for another machine where one is taken back."""
    spec, store, now = smoke_spec(data, "real-1", "ec2", 20.0), open_store(STORE), cloud.clock.now
    for _ in range(LAUNCHES):
        backend = Ec2Backend(settings, now=now, sleep=cloud.pass_time, client=cloud.client)
        try:
            launch(store, spec, None, data, backend, now())
        except ProviderError:
            cloud.pass_time(1.0)
            continue
        state = watch(store, "real-1", backend, io.StringIO(), poll_seconds=0.2, now=now, sleep=cloud.pass_time)
        assert not cloud.pending, "the blow never fell"
        return state, backend
    raise AssertionError(f"launched {LAUNCHES} times\n{cloud.said()}")


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("blow", BLOWS)
def test_a_machine_that_really_trains_comes_to_its_adapter_although(blow: str, cloud: RealEc2, tmp_path: Path) -> None:
    account, store = cloud.account, open_store(STORE)
    account.faults += [Fault(**vars(fault)) for fault in BLOWS[blow]]
    account.no_capacity = {(TYPE, BOTH[0])} if "full" in blow else set()
    cloud.pending = blow if blow in (*TAKEN, "the clock jumps") else ""
    market = {"LORRY_EC2_MARKET": "spot" if blow in TAKEN else "on-demand"}
    state, backend = live(cloud, tmp_path / "data", ENVIRONMENT | market)
    assert state.state == "completed", f"{state}\n{cloud.said()}"
    give_up = time.monotonic() + 120
    while account.alive():  # the end of its user data
        assert time.monotonic() < give_up, cloud.said()
        cloud.pass_time(0.2)
    assert pull(store, "real-1", tmp_path / "adapter").effect > 0
    assert len(account.machines) == (2 if blow in TAKEN else 1)
    assert not account.faults
    settlement = settle(store, read_job(store, "real-1"), state, backend.charges, cloud.clock.now())
    assert settlement is not None
    assert settlement.is_final
    assert settlement.usd == pytest.approx(account.total(), abs=0.002 * len(account.machines))  # stamps in seconds
