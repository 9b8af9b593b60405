"""Two nodes of one job on this machine, each a host with its own network and disk: one dies, and the run resumes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recipes.catalog import load_catalog
from recipes.causes import EXIT_CODES
from recipes.job import Attempt, NodeFailure, Result
from recipes.load import LoadedRecipe, load_recipe, recipe_sha256
from recipes.recipe import Recipe
from scripts.adapter import verify_adapter
from scripts.container import node_words
from scripts.container.follower import _Follower
from scripts.container.node_words import say
from scripts.container.nodes import ALONE, Node, network_variables, node_of
from scripts.container.pod_end import INTERRUPTED
from scripts.container.run import _Container
from scripts.container.supervisor import Timing, end_leftovers
from scripts.container.verdict import End, Ending
from scripts.errors import InputError, Problem, ProviderError
from scripts.machine import Machine
from scripts.models import making_commands
from scripts.plan import make_plan
from scripts.render import render
from scripts.state import job_state
from scripts.store import open_store
from scripts.tokenizer import find_tokenizer
from scripts.training_set import prepare
from tests.container.conftest import LIMIT_SECONDS, REPOSITORY, Job


def test_a_machine_reads_its_place_among_the_nodes() -> None:
    two = {"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.4"}
    assert node_of({}) == node_of({"NODES": "1", "MASTER_ADDR": "10.0.0.4"}) == ALONE
    assert node_of(two) == Node(2, 1, "10.0.0.4", 29500)
    assert " ".join(node_of(two | {"MASTER_PORT": "4000"}).words(3)) == (
        "--nnodes 2 --node_rank 1 --master_addr 10.0.0.4 --master_port 4003"
    )
    assert ALONE.words(1)[:6] == ["--nnodes", "1", "--node_rank", "0", "--master_addr", "127.0.0.1"]


def test_gloo_and_nccl_are_told_the_interface_that_leads_to_node_0() -> None:
    here = {"NODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    assert network_variables(here) == dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo")
    assert network_variables(here | {"NCCL_SOCKET_IFNAME": "eth1"})["NCCL_SOCKET_IFNAME"] == "eth1"
    assert network_variables(here | {"MASTER_ADDR": "no.such.host.invalid"}) == network_variables({}) == {}


@pytest.mark.parametrize(
    ("odd", "sentence"),
    [
        ({"NODES": "two"}, "NODES: 'two'"),
        ({"NODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "h"}, "NODE_RANK: '2'; a whole number from 0 to 1"),
        ({"NODES": "2", "MASTER_ADDR": "h"}, "NODE_RANK: ''; a whole number from 0 to 1"),
        ({"NODES": "2", "NODE_RANK": "1"}, "MASTER_ADDR: ''; the name or address of node 0"),
        ({"NODES": "2", "MASTER_ADDR": "a b"}, "MASTER_ADDR: 'a b'"),
    ],
)
def test_a_place_that_cannot_be_is_refused(odd: dict[str, str], sentence: str) -> None:
    with pytest.raises(InputError) as refused:
        node_of(odd)
    assert sentence.partition(";")[0] in str(refused.value)
    assert sentence.partition("; ")[2] in str(refused.value)


@dataclass(frozen=True)
class Host:
    """A host of its own on this machine: a network namespace, joined to another by a cable."""

    name: str
    address: str

    def kill(self) -> None:
        """Everything that runs there ends at once, as it does when the host loses its power."""
        said = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        for pid in said.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two of them; each sees only itself and the other."""
    number, net = os.getpid(), f"10.213.{os.getpid() % 250}"
    made = Host(f"lorry-{number}-0", f"{net}.1"), Host(f"lorry-{number}-1", f"{net}.2")
    tried = shutil.which("ip") and subprocess.run(
        ["ip", "netns", "add", made[0].name], capture_output=True, check=False
    )
    if not tried or tried.returncode:
        pytest.skip("network namespaces cannot be made here: that takes root and `ip netns`")
    try:
        ip("netns", "add", made[1].name)
        ip("link", "add", "cable", "netns", made[0].name, "type", "veth", "peer", "cable", "netns", made[1].name)
        for host in made:
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "cable")
            for link in ("lo", "cable"):
                ip("-n", host.name, "link", "set", link, "up")
        yield made
    finally:
        for host in made:
            host.kill()
            ip("netns", "delete", host.name)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def start_replay(make_job: Any, tmp_path: Path) -> Iterator[Any]:
    """start_replay(job, rank, **variables): the container of that node, with the replay trainer."""
    started: list[subprocess.Popen[bytes]] = []

    def start(job: Job, rank: int, **variables: str) -> subprocess.Popen[bytes]:
        place = {"NODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"} | variables
        command = [sys.executable, "-m", job.module, "--store", job.store.url, "--job", job.spec.job_id]
        command += ["--work", str(tmp_path / f"node-{rank}")]
        started.append(subprocess.Popen(command, env=job.environment | place, cwd=REPOSITORY))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
    for folder in (tmp_path / "store" / "job-1", tmp_path / "node-1"):
        end_leftovers(folder)


@pytest.mark.parametrize(
    ("variables", "faults", "cause", "sentence"),
    [
        ({"LORRY_MODELS": "/nowhere"}, {}, "bad_base_model", r"stage it again \(node 1: /nowhere/.*: there is no such"),
        ({}, {"1": ["out_of_memory", 2]}, "out_of_memory", r"a GPU ran out of memory.* \(node 1\)$"),
    ],
)
def test_why_a_following_node_failed_is_said_by_the_job(
    make_job: Any, start_replay: Any, models: Path, variables: Any, faults: Any, cause: str, sentence: str
) -> None:
    job: Job = make_job(faults={"1": ["hang", 4]}, timing={"grace": 1.0})
    staged = load_recipe("qwen3-8b/zero3").recipe  # a model that no machine makes by itself
    shutil.copytree(models / "lorry--smoke", job.data.parent / "models" / "Qwen--Qwen3-8B")
    job.environment["LORRY_MODELS"] = str(job.data.parent / "models")
    job.spec = job.spec.model_copy(update={"recipe": staged})
    job.store.write("job-1/launch.json", job.spec.model_dump_json().encode())
    for name in ("train.jsonl", "valid.jsonl"):
        job.store.put_file(job.data / name, f"job-1/data/{name}")
    own = {"steps": 8, "step_seconds": 0.02, "checkpoint_steps": 3, "faults": faults}
    job.store.write("job-1/replay-1.json", json.dumps(own).encode())
    follower, leader = start_replay(job, 1, **variables), start_replay(job, 0)
    job.wait(lambda: leader.poll() is not None and follower.poll() is not None)
    container = job.files().container
    assert container is not None
    assert (container.ended, container.cause) == ("failed", cause)
    assert re.search(sentence, container.sentence), container.sentence
    state = job_state(job.files(), None, time.time())
    assert (state.state, state.sentence) == ("failed", container.sentence)
    assert leader.returncode == follower.returncode == EXIT_CODES[container.cause]


def test_a_following_node_asks_a_silent_store_again(make_job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job: Job = make_job()
    job.store.write("job-1/launch.json", job.spec.model_dump_json().encode())
    for name in ("train.jsonl", "valid.jsonl"):
        job.store.put_file(job.data / name, f"job-1/data/{name}")
    environment = {"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
    work = job.data.parent / "node-1"
    machine = Machine(job.store, "job-1", work, work, environment, timing=Timing(contact=0.01))
    get_file, failures = job.store.get_file, [ProviderError(Problem("the store", "no answer", "wait"))] * 3

    def silent(*given: Any) -> None:
        if failures:
            raise failures.pop()
        get_file(*given)

    monkeypatch.setattr(type(job.store), "get_file", lambda _, *given: silent(*given))
    assert _Follower(machine)._fetched_in_time().job_id == "job-1"
    assert failures == []


@pytest.fixture
def metadata() -> Iterator[SimpleNamespace]:
    """The metadata service of a machine of EC2: its environment, and whether it is to be taken back in two minutes."""
    service = SimpleNamespace(notice=False)

    class Service(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if service.notice else 404)
            self.send_header("content-length", "0")
            self.end_headers()

        def do_PUT(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        service.environment = {"LORRY_MACHINE": "ec2", "AWS_EC2_METADATA_SERVICE_ENDPOINT": url}
        yield service
        server.shutdown()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_node_that_is_taken_back_is_recorded_until_another_machine_has_the_job(
    make_job: Any, start_replay: Any, metadata: SimpleNamespace, rank: int
) -> None:
    job: Job = make_job(checkpoint_steps=50, faults={"1": ["hang", 4]})
    job.store.write("job-1/launch.json", job.spec.model_dump_json().encode())
    for name in ("train.jsonl", "valid.jsonl"):
        job.store.put_file(job.data / name, f"job-1/data/{name}")
    nodes = [start_replay(job, number, **(metadata.environment if number == rank else {})) for number in (0, 1)]
    job.reach(4)
    metadata.notice = True
    for number in {0, rank}:
        assert nodes[number].wait(LIMIT_SECONDS) == INTERRUPTED, job.log()
    container = job.files().container
    assert container is not None
    assert container.ended is None
    assert container.taken_at is not None
    assert start_replay(job, 0, NODES="1").wait(LIMIT_SECONDS) == 0, job.log()
    container = job.files().container
    assert container is not None
    assert (container.ended, container.taken_at) == ("completed", None)


@pytest.mark.parametrize("end", [End(0, None), End(-signal.SIGKILL, "node_failed")])
def test_a_completed_attempt_waits_for_no_word_and_is_not_trained_again(
    make_job: Any, monkeypatch: pytest.MonkeyPatch, end: End
) -> None:
    job: Job = make_job()
    two = {"NODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    container = _Container(Machine(job.store, "job-1", job.folder, job.folder, two))
    container._book.note(attempts=(Attempt(number=1, started_at=time.time()),))
    result = Result(job_id="job-1", outcome="completed", exit_code=0, attempt=1, step=8, total_steps=8)
    (job.folder / "result.json").write_text(result.model_dump_json())
    if end.halt:
        say(job.store, "job-1", NodeFailure(node=1, attempt=1, cause="lost_rank", sentence="", at=time.time()))
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: pytest.fail("it waits for a word"))
    monkeypatch.setattr(node_words, "time", clock)
    assert container._close_attempt(end) == Ending("completed")


class Nodes:
    """The hands on two containers of one job, each on its own host."""

    def __init__(self, job: Job, disks: Path, models: Path, hosts: tuple[Host, Host]) -> None:
        self.job, self._disks, self._models, self._hosts = job, disks, models, hosts
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, rank: int, disk: str) -> subprocess.Popen[bytes]:
        """The container of that node, as its provider would start it."""
        place = {"NODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": self._hosts[0].address}
        environment = self.job.environment | place | {"LORRY_MODELS": str(self._disks / disk / "models")}
        command = ["ip", "netns", "exec", self._hosts[rank].name, sys.executable, "-m", "scripts.container"]
        command += ["--store", self.job.store.url]
        command += ["--job", self.job.spec.job_id, *(["--work", str(self._disks / disk)] if rank else [])]
        shutil.copytree(self._models, self._disks / disk / "models")
        with (self._disks / f"{disk}.log").open("w") as log:
            process = subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=log, stderr=log)
        self._started.append(process)
        return process

    def end(self) -> None:
        """Nobody is left, whatever happened; the children of a container die with it."""
        for process in self._started:
            process.kill()
            process.wait()

    def wait_for(self, process: subprocess.Popen[bytes]) -> int:
        """The exit code of a container."""
        self.job.wait(lambda: process.poll() is not None, seconds=600)
        return process.returncode


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke model, plain and in int8, to be copied to the disk of each node."""
    models = tmp_path_factory.mktemp("models")
    for command in making_commands(models, load_recipe("smoke/replica").recipe):
        subprocess.run(command, cwd=REPOSITORY, check=True, timeout=200)
    return models


@pytest.fixture
def make_nodes(tmp_path: Path, staged: Path, hosts: tuple[Host, Host]) -> Any:
    """make_nodes("smoke/zero3", max_steps=6): the job of a shipped recipe, one CPU process on each of two hosts."""
    made: list[Nodes] = []

    def make(name: str, **training: Any) -> Nodes:
        loaded, catalog = load_recipe(name), load_catalog()
        values = loaded.recipe.model_dump()
        values["training"] |= training
        recipe = Recipe.model_validate(values)
        loaded = LoadedRecipe(name, recipe, recipe_sha256(recipe))
        store = open_store((tmp_path / "store").as_uri())
        tokenizer = find_tokenizer(recipe.base.id, [REPOSITORY / "recipes" / "smoke"])
        source = REPOSITORY / "examples" / "bicycle-care.jsonl"
        report = prepare(source, tmp_path / "data", recipe.data, recipe.training.seed, tokenizer)
        plan = make_plan(loaded, report, catalog)
        spec = render(loaded, plan, report, catalog, job_id="nodes-1", backend="local", store=store.url, commit=None)
        spec = spec.model_copy(update={"gpus": 1, "nodes": 2})
        folder = tmp_path / "store" / "nodes-1"
        folder.mkdir(parents=True)
        (tmp_path / "data").rename(folder / "data")
        (folder / "launch.json").write_text(spec.model_dump_json())
        job = Job(store, folder, {**os.environ}, spec, folder / "data", "scripts.container")
        made.append(Nodes(job, tmp_path, staged, hosts))
        return made[-1]

    yield make
    for nodes in made:
        nodes.end()


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_a_host_killed_under_zero3_comes_back_with_an_empty_disk_and_the_run_resumes(
    make_nodes: Any, hosts: tuple[Host, Host]
) -> None:
    nodes = make_nodes("smoke/zero3", max_steps=8, checkpoint_steps=2)
    job = nodes.job
    leader, follower = nodes.start(0, "node-0"), nodes.start(1, "node-1")
    job.wait(lambda: (s := job.files().status) and s.step >= 3)
    before = job.files().container
    assert before is not None
    hosts[1].kill()
    assert follower.wait() == -signal.SIGKILL
    job.wait(lambda: (c := job.files().container) and len(c.attempts) > len(before.attempts))
    back = nodes.start(1, "node-1-again")
    assert (nodes.wait_for(leader), nodes.wait_for(back)) == (0, 0), job.log()
    files = job.files()
    assert files.container is not None
    assert files.container.ended == "completed"
    assert (files.container.attempts[-1].resumed_from or "") >= "step-000002"
    assert files.result is not None
    assert files.result.world_size == 2
    assert verify_adapter(job.folder / "adapter", base_model="lorry/smoke").effect > 0
    assert (job.folder / "logs" / f"trainer-{files.container.attempts[-1].number}-node-1.log").is_file()


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_two_nodes_with_a_replica_each_make_one_adapter(make_nodes: Any) -> None:
    nodes = make_nodes("smoke/replica", max_steps=3)
    containers = [nodes.start(rank, f"node-{rank}") for rank in (1, 0)]
    assert [nodes.wait_for(container) for container in containers] == [0, 0], nodes.job.log()
    files = nodes.job.files()
    assert files.result is not None
    assert (files.result.outcome, files.result.world_size) == ("completed", 2)
    assert verify_adapter(nodes.job.folder / "adapter", base_model="lorry/smoke").effect > 0
