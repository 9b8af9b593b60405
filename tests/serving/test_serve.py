"""An adapter goes live when the server is heard to answer with it; whatever else happens, the old one stays live."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from recipes.serving import Place, Serving
from scripts import audit
from scripts.errors import Conflict, InputError, NotFound, Refused, VerificationFailed
from scripts.machine import trainer_environment
from scripts.serving.client import Vllm
from scripts.serving.history import following, history, newest
from scripts.serving.outcomes import WINDOW_SECONDS, Told, keep
from scripts.serving.probe import listen, read_points
from scripts.serving.publish import Desk, check, publish, roll_back
from scripts.serving.worker import Worker, answer_command
from scripts.store import open_store
from scripts.store.base import sha256_of
from tests.serving.conftest import finished_job
from tests.serving.fake_vllm import FakeVllm, served

BASE = "lorry/smoke"
pytestmark = pytest.mark.timeout(900)  # many processes that load torch, on a busy machine


@pytest.fixture(scope="module")
def worker(made: Any) -> Iterator[Worker]:
    worker = Worker(answer_command(made.models / "lorry--smoke"), trainer_environment(os.environ, on_cpu=True))
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def two(made: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two evaluated jobs, each with an adapter of its own: good-1 and good-2."""
    store = tmp_path_factory.mktemp("two") / "jobs"
    shutil.copytree(made.store, store)
    finished_job(store, made.models, "good-2", rate=0.02, seed=5)
    from scripts.evaluate import evaluate

    for job in ("good-1", "good-2"):
        assert evaluate(open_store(store.as_uri()), job, made.models, os.environ, now=1.0).passed
    return store


class Scene:
    """A store, a server, and a desk between them whose clock moves when it sleeps."""

    def __init__(self, store: Path, server: FakeVllm, url: str, adapters: Path) -> None:
        self.store, self.server = open_store(store.as_uri()), server
        self.place = Place(url=url, base=BASE, adapters=adapters.as_uri(), mounted=str(adapters), form="peft")
        ticks = itertools.count(1000.0, 0.001)
        self.slept = 0.0

        def sleep(seconds: float) -> None:
            self.slept += seconds

        self.desk = Desk(self.store, "main", Vllm(url), os.environ, "ann", lambda: next(ticks) + self.slept, sleep)

    def publish(self, job: str, **options: Any) -> Serving:
        return publish(self.desk, job, self.place, **options)

    def hears(self, job: str) -> bool:
        points = read_points(Path(self.store.url.removeprefix("file://")) / job / "probe.safetensors")
        return listen(self.desk.vllm, BASE, job, points).problem is None


@pytest.fixture
def scene(two: Path, worker: Worker, tmp_path: Path) -> Iterator[Scene]:
    server = FakeVllm(worker, BASE, tmp_path)
    with served(server) as url:
        yield Scene(Path(shutil.copytree(two, tmp_path / "jobs")), server, url, tmp_path / "adapters")


def test_a_published_adapter_is_heard_and_the_way_back_is_one_call(scene: Scene) -> None:
    first = scene.publish("good-1")
    assert (first.live, first.outcome) == ("good-1", "done")
    assert first.error is not None
    assert first.error < 0.01
    second = scene.publish("good-2")
    assert (second.live, second.earlier) == ("good-2", ("good-1",))
    assert scene.hears("good-2")
    assert scene.hears("good-1")  # still loaded: the way back needs no loading
    back = roll_back(scene.desk, "the client complains")
    assert (back.live, back.earlier) == ("good-1", ())
    assert "good-2" in scene.server.adapters  # web apps may name it yet
    with pytest.raises(Refused, match="no adapter was live there before"):
        roll_back(scene.desk)
    deeds = [(entry.what, entry.subject) for entry in audit.verify(scene.store).entries]
    assert deeds == [("promote", "good-1"), ("promote", "good-2"), ("roll back", "good-1")]
    assert [s.outcome for s in history(scene.store, "main")] == ["begun", "done"] * 3


@pytest.mark.parametrize(
    "fault", ["ignores", *(pytest.param(f, marks=pytest.mark.slow) for f in ("half", "crashes", "flaky"))]
)
def test_a_server_that_does_not_answer_with_the_adapter_keeps_the_old_one(fault: Any, scene: Scene) -> None:
    scene.publish("good-1")
    scene.server.fault, scene.server.victims = fault, {"good-2"}
    with pytest.raises(VerificationFailed) as caught:
        scene.publish("good-2")
    state = newest(scene.store, "main")
    assert (state.live, state.outcome) == ("good-1", "failed")
    if fault == "crashes":
        assert "does not answer either" in str(caught.value)  # it died, and says so instead of calling it well
        scene.server.restart()
        scene.server.fault = ""
        assert check(scene.desk).outcome == "done"
    else:
        words = "100% of 20 real" if fault == "flaky" else "the adapter is ignored, loaded in part, or another one"
        assert words in str(caught.value)
        assert "good-1 stays live" in str(caught.value)
        assert "good-2" not in scene.server.adapters
    assert scene.hears("good-1")


@pytest.mark.slow
def test_ready_is_what_is_heard_and_not_what_is_said(scene: Scene) -> None:
    scene.server.fault = "early"
    assert scene.publish("good-1").live == "good-1"
    assert scene.slept >= 2


@pytest.mark.slow
def test_a_server_that_never_becomes_ready_is_given_up(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.serving.fake_vllm.EARLY", 10**6)
    monkeypatch.setattr("scripts.serving.client.Vllm.ready_seconds", 20.0)
    scene.server.fault = "early"
    with pytest.raises(VerificationFailed, match="does not exist"):
        scene.publish("good-1")
    assert newest(scene.store, "main").live is None


def test_what_a_restart_forgot_is_loaded_again(scene: Scene) -> None:
    scene.publish("good-1")
    scene.server.restart()
    state = check(scene.desk)
    assert (state.deed, state.outcome, state.live) == ("reload", "done", "good-1")
    assert check(scene.desk) == state  # nothing to do, nothing written


@pytest.mark.slow
def test_an_adapter_that_stops_working_goes_back_by_itself(scene: Scene) -> None:
    scene.publish("good-1")
    scene.publish("good-2")
    scene.server.fault, scene.server.victims = "ignores", {"good-2"}
    state = check(scene.desk)
    assert (state.deed, state.live) == ("roll back", "good-1")
    assert "does not answer as trained" in state.sentence
    assert scene.hears("good-1")


def _chats(scene: Scene, job: str, answered: int, failed: int) -> None:
    """What the web app tells of the five minutes that follow the next ones, and the clock is there."""
    scene.desk.sleep(2 * WINDOW_SECONDS)
    now = scene.desk.now()
    window = int(now // WINDOW_SECONDS)
    told = Told(model=job, reporter="web-app-1", window=window, answered=answered, failed=failed)
    keep(scene.store, "main", job, told, now)


@pytest.mark.slow
def test_an_adapter_that_answers_as_trained_goes_back_when_users_chats_fail(scene: Scene) -> None:
    scene.publish("good-1")
    _chats(scene, "good-2", 0, 50)  # of another stay of the adapter there: not held against it
    live = scene.publish("good-2")
    assert check(scene.desk) == live
    _chats(scene, "good-2", 96, 4)
    assert check(scene.desk) == live
    _chats(scene, "good-2", 0, 5)
    state = check(scene.desk)
    assert (state.deed, state.live) == ("roll back", "good-1")
    assert "9 of 105 of the users' own chats failed; at most 5%; was good-2" in state.sentence
    _chats(scene, "good-1", 10, 10)
    with pytest.raises(VerificationFailed, match="10 of 20 of the users' own chats failed"):
        check(scene.desk)  # no adapter was live before: a person has to look
    assert newest(scene.store, "main") == state


@pytest.mark.slow
def test_a_canary_is_proven_but_not_live(scene: Scene) -> None:
    scene.publish("good-1")
    state = scene.publish("good-2", canary=0.1)
    assert (state.live, state.canary, state.canary_share) == ("good-1", "good-2", 0.1)
    assert check(scene.desk) == state
    scene.server.fault, scene.server.victims = "flaky", {"good-2"}
    withdrawn = check(scene.desk)
    assert (withdrawn.live, withdrawn.canary, withdrawn.canary_share) == ("good-1", None, 0.0)
    assert "real requests failed" in withdrawn.sentence
    assert "good-2" not in scene.server.adapters
    scene.server.fault = ""
    scene.publish("good-2", canary=0.1)
    _chats(scene, "good-2", 3, 7)
    assert check(scene.desk).sentence == "withdrawn: 7 of 10 of the users' own chats failed; at most 5%"
    assert scene.publish("good-2").live == "good-2"


def test_a_deed_that_was_broken_off_goes_on_by_the_same_hand(scene: Scene) -> None:
    begun = {"deed": "publish", "job_id": "good-1", "by": "ann", "at": scene.desk.now(), "outcome": "begun"}
    following(scene.store, "main", None, place=scene.place, live=None, **begun)
    assert scene.publish("good-1").live == "good-1"


@pytest.mark.slow
def test_one_job_under_another_jobs_adapter_is_not_taken_for_it(scene: Scene) -> None:
    """The files of good-1 under the name good-2: it acts, but not as the trainer of good-2 recorded."""
    scene.publish("good-1")
    folder = scene.place.adapters.removeprefix("file://")
    shutil.copytree(f"{folder}/good-1", f"{folder}/swapped")
    scene.desk.vllm.load("good-2", f"{folder}/swapped")
    assert not scene.hears("good-2")


@pytest.mark.slow
def test_nothing_is_touched_before_everything_is_in_order(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "jobs" / "good-1" / "evaluation.json").unlink()
    with pytest.raises(Refused, match="not evaluated"):
        scene.publish("good-1")
    scene.place = scene.place.model_copy(update={"base": "Qwen/Qwen3-8B"})
    with pytest.raises(Refused, match="this place serves Qwen/Qwen3-8B"):
        scene.publish("good-2")
    scene.place = scene.place.model_copy(update={"base": BASE, "form": "vllm", "max_lora_rank": 1})
    with pytest.raises(Refused, match="rank 8, above the server's 1"):
        scene.publish("good-2")
    for changes, words in (
        ({"base_sha256": "0" * 64}, "trained on other files of the base"),
        ({"expert_gib": 0.0001}, r"1 x rank 16 takes .* GiB for 8 experts in 4 layers, and there are 0.0 GiB"),
    ):
        scene.place = scene.place.model_copy(update={"base_sha256": None, "max_lora_rank": 16} | changes)
        with pytest.raises(Refused, match=words):
            scene.publish("good-2")
    scene.place = scene.place.model_copy(update={"expert_gib": None})
    scene.server.base = "another/model"
    with pytest.raises(Refused, match="it serves another/model, not lorry/smoke"):
        scene.publish("good-2")
    scene.server.base = BASE
    _rename_modules(tmp_path / "jobs" / "good-2" / "adapter")
    with pytest.raises(Refused, match="vLLM knows no such module"):
        scene.publish("good-2", override="to see what the server would say")
    assert scene.server.adapters == {}
    assert history(scene.store, "main") == []
    with pytest.raises(NotFound, match="nothing was ever published"):
        newest(scene.store, "main")
    with pytest.raises(InputError, match="a-z, 0-9"):
        newest(scene.store, "../main")


def _rename_modules(adapter: Path) -> None:
    """An adapter of modules that nobody has, vouched for as if it were whole."""
    from safetensors.torch import load_file, save_file

    weights = adapter / "adapter_model.safetensors"
    tensors = {name.replace("o_proj", "zz_proj"): tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    manifest = json.loads((adapter / "manifest.json").read_text())
    manifest["files"][weights.name] = sha256_of(weights)
    (adapter / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.slow
def test_shared_experts_go_live_where_the_server_shares_them_and_nowhere_else(
    scene: Scene, made: Any, tmp_path: Path
) -> None:
    finished_job(tmp_path / "jobs", made.models, "shared-1", adapter={"expert_layout": "shared_outer"})
    scene.place = scene.place.model_copy(update={"form": "shared", "max_lora_rank": 8})
    why = "the layout is what is tested"
    with pytest.raises(Refused, match="a factor of the hidden dimension differs between experts"):
        scene.publish("good-1")
    assert not (tmp_path / "adapters").exists()
    with pytest.raises(VerificationFailed, match="experts are laid out otherwise"):
        scene.publish("shared-1", override=why)
    scene.server.shares_experts = True
    state = scene.publish("shared-1", override=why)
    assert (state.live, state.place.form) == ("shared-1", "shared")
    assert scene.hears("shared-1")


@pytest.mark.slow
def test_a_server_that_was_started_without_lora_is_asked_nothing_more(scene: Scene, tmp_path: Path) -> None:
    scene.server.has_lora = False
    with served(scene.server) as url:
        scene.desk = dataclasses.replace(scene.desk, vllm=Vllm(url))
        with pytest.raises(Refused, match="it was started without LoRA; start it with --enable-lora"):
            scene.publish("good-1")
    assert not (tmp_path / "adapters").exists()


@pytest.mark.slow
def test_an_override_is_in_the_audit_with_its_reason(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "jobs" / "good-1" / "evaluation.json").unlink()
    scene.publish("good-1", override="the client wants to see it today")
    entries = audit.verify(scene.store).entries
    assert (entries[0].what, entries[0].note) == ("override", "the client wants to see it today")


def test_two_publishers_cannot_both_change_a_place(scene: Scene) -> None:
    before = scene.publish("good-1")
    changes = {"deed": "publish", "job_id": "good-2", "by": "bob", "at": scene.desk.now(), "outcome": "begun"}
    following(scene.store, "main", before, **changes)
    with pytest.raises(Conflict, match="bob began to publish good-2"):
        scene.publish("good-2")
    with pytest.raises(Conflict, match="at the same time"):
        following(scene.store, "main", before, **changes)


@pytest.mark.parametrize("url", ["http://example.com", "https://user@host", "ftp://x", "nonsense"])
def test_no_adapter_is_managed_in_the_clear(url: str) -> None:
    with pytest.raises(InputError, match="https://host"):
        Vllm(url)


@pytest.mark.slow
def test_the_local_server_answers_as_openais_client_expects(scene: Scene) -> None:
    from openai import NotFoundError, OpenAI

    scene.publish("good-1")
    client = OpenAI(base_url=f"{scene.place.url}/v1", api_key="none")
    assert {model.id for model in client.models.list()} == {BASE, "good-1"}
    question: Any = [{"role": "user", "content": "My chain squeaks."}]
    said = {
        model: client.chat.completions.create(model=model, messages=question, max_tokens=12, temperature=0)
        for model in (BASE, "good-1")
    }
    assert said[BASE].choices[0].message.content != said["good-1"].choices[0].message.content
    assert said[BASE].usage is not None
    assert said[BASE].usage.completion_tokens <= 12
    with pytest.raises(NotFoundError, match="one of lorry/smoke, good-1"):
        client.chat.completions.create(model="nobody-1", messages=question)


@pytest.mark.slow
def test_a_person_publishes_looks_and_goes_back_at_a_terminal(scene: Scene, made: Any, tmp_path: Path) -> None:
    at: Callable[..., Any] = lambda *words: made.__class__(tmp_path / "jobs", made.models).lorry("serve", *words)  # noqa: E731
    missing = at("good-1")
    assert missing.returncode == 2
    assert "--at: missing" in missing.stderr
    first = at("good-1", "--at", scene.place.url, "--adapters", scene.place.adapters, "--max-lora-rank", "8")
    assert first.returncode == 0, first.stderr
    assert "live: good-1" in first.stdout
    second = at("good-2", "--json")
    assert json.loads(second.stdout)["live"] == "good-2"
    assert "live: good-1" in at("--roll-back").stdout
    assert len(at("--history").stdout.splitlines()) == 6
    assert at("good-1", "--check").returncode == 2
