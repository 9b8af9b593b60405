"""Counts of users' own chats: whatever is lost or comes twice, each chat counts once, and chance moves nothing."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.job import Manifest
from recipes.serving import Outcomes, Place, Serving
from scripts.errors import Conflict, InputError, VerificationFailed
from scripts.evaluate import Promotable
from scripts.serving import publish as publishing
from scripts.serving.client import Offer, Vllm
from scripts.serving.history import following, history, newest
from scripts.serving.outcomes import LEAST_FAILED, WINDOW_SECONDS, WINDOWS, Told, complaint, counted, keep
from scripts.serving.publish import Desk, check, publish, roll_back
from scripts.store import open_store

NOW = 1_790_000_200.0
WINDOW = int(NOW // WINDOW_SECONDS)


def _told(reporter: str, window: int, answered: int, failed: int) -> Told:
    return Told(model="good-1", reporter=reporter, window=window, answered=answered, failed=failed)


def test_totals_that_come_twice_or_late_count_once_and_only_of_the_last_hour(tmp_path: Path) -> None:
    store = open_store(tmp_path.as_uri())
    for answered in (1, 5, 9, 9, 5):  # the same process, over and over; one message was overtaken
        keep(store, "main", "good-1", _told("process-1", WINDOW, answered, 1), NOW)
    keep(store, "main", "good-1", _told("process-2", WINDOW, 2, 0), NOW)
    keep(store, "main", "good-1", _told("process-1", WINDOW - 1, 4, 0), NOW)
    keep(store, "main", "good-2", _told("process-1", WINDOW, 70, 70), NOW)
    keep(store, "test", "good-1", _told("process-1", WINDOW, 70, 70), NOW)
    assert counted(store, "main", "good-1", 0.0, NOW) == Outcomes(answered=15, failed=1)
    assert counted(store, "main", "good-1", WINDOW * WINDOW_SECONDS, NOW) == Outcomes(answered=11, failed=1)
    assert counted(store, "main", "good-1", NOW, NOW) == Outcomes()  # the window began before it was live
    assert counted(store, "main", "good-1", 0.0, NOW + (WINDOWS - 1) * WINDOW_SECONDS) == Outcomes(
        answered=11, failed=1
    )
    assert counted(store, "main", "good-1", 0.0, NOW + WINDOWS * WINDOW_SECONDS) == Outcomes()
    (tmp_path / "_outcomes" / "main" / "good-1" / str(WINDOW) / "process-2.json").write_text("half")
    assert counted(store, "main", "good-1", 0.0, NOW) == Outcomes(answered=13, failed=1)


@pytest.mark.parametrize("window", [0, WINDOW - 2, WINDOW + 2])
def test_a_process_with_a_wrong_clock_hears_the_right_window(tmp_path: Path, window: int) -> None:
    with pytest.raises(InputError, match=f"window: {window}; {WINDOW}: Unix time over 300"):
        keep(open_store(tmp_path.as_uri()), "main", "good-1", _told("process-1", window, 1, 0), NOW)
    assert not list(tmp_path.iterdir())


@given(answered=st.integers(0, 10**9), failed=st.integers(0, 10**9))
def test_it_complains_of_five_failures_or_more_that_are_more_than_one_in_twenty(answered: int, failed: int) -> None:
    said = complaint(Outcomes(answered=answered, failed=failed))
    assert (said is not None) == (failed >= LEAST_FAILED and 20 * failed > answered + failed)
    more = complaint(Outcomes(answered=answered, failed=failed + 1))
    assert more is not None or said is None


class Server(Vllm):
    """Answers as every adapter was trained: a token is worth -2 to the base, and -1 to an adapter."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:9")
        self.loaded = {"one", "two", "three"}
        self.deaf: set[str] = set()
        self.unloaded_in: list[Serving] = []
        self.look: Any = None

    def models(self) -> dict[str, str | None]:
        return {"base": None, **dict.fromkeys(self.loaded, "base")}

    def load(self, name: str, path: str) -> None:
        self.loaded.add(name)

    def unload(self, name: str) -> None:
        self.loaded.discard(name)
        if self.look:
            self.unloaded_in.append(self.look())

    def offer(self) -> Offer:
        return Offer(lora=True)

    def log_probabilities(self, model: str, ids: Sequence[int]) -> list[float | None]:
        return [None, *(-2.0 if model == "base" or model in self.deaf else -1.0 for _ in ids[1:])]

    def answers(self, model: str, ids: Sequence[int]) -> bool:
        return True


class Scene:
    """A place where `three`, `two` and then `one` were published days ago; a clock of its own."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.store, self.server, self.clock = open_store(folder.as_uri()), Server(), NOW
        place = Place(url="http://127.0.0.1:9", base="base", adapters="file:///a", mounted="/a")
        self.desk = Desk(self.store, "main", self.server, {}, "ann", lambda: self.clock, lambda seconds: None)
        for job in ("one", "two", "three", "four"):
            (folder / job).mkdir()
            (folder / job / "probe.safetensors").write_bytes(_probe())
        days_ago = NOW - 3 * 86_400
        self.state: Serving | None = None
        self.wrote("publish", "one", place=place, live="one", earlier=("two", "three"), at=days_ago, **changes)

    def wrote(self, deed: str, job: str, **changes: Any) -> Serving:
        said = {"by": "bob", "at": self.clock, "outcome": "done", "deed": deed, "job_id": job}
        states = history(self.store, "main")
        return following(self.store, "main", states[-1] if states else None, **said | changes)

    def later(self) -> None:
        self.clock += 2 * WINDOW_SECONDS

    def chats(self, job: str, answered: int = 0, failed: int = 10) -> None:
        told = _told("process-1", int(self.clock // WINDOW_SECONDS), answered, failed)
        keep(self.store, "main", job, told, self.clock)


def _probe() -> bytes:
    """One conversation of two tokens, of which the second is scored, as trainer/probe.py writes it."""
    parts = {"ids.0": ("I64", [2], struct.pack("<2q", 0, 1)), "positions.0": ("I64", [1], struct.pack("<q", 0))}
    parts["base.0"] = ("F32", [1, 2], struct.pack("<2f", -2.0, -2.0))
    parts["trained.0"] = ("F32", [1, 2], struct.pack("<2f", -1.0, -1.0))
    header, start = {}, 0
    for name, (dtype, shape, data) in parts.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start := start + len(data)]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in parts.values())


@pytest.mark.parametrize(("deed", "outcome"), [("canary", "done"), ("publish", "failed")])
def test_chats_that_fail_while_another_adapter_is_put_there_are_not_held_against_the_live_one(
    tmp_path: Path, deed: str, outcome: str
) -> None:
    scene = Scene(tmp_path, canary="three", canary_share=0.2)
    scene.wrote(deed, "four", outcome="begun")
    scene.later()
    scene.server.deaf = {"three"}
    scene.chats("one")  # the workers of the endpoint are replaced: nobody answers
    with pytest.raises(Conflict, match=f"bob began to {deed} four and has not finished"):
        check(scene.desk)
    assert history(scene.store, "main")[-1].outcome == "begun"  # nor is the canary withdrawn meanwhile
    scene.server.deaf = set()
    state = scene.wrote(deed, "four", outcome=outcome)
    assert check(scene.desk) == state
    scene.later()
    scene.chats("one")
    assert (check(scene.desk).live, history(scene.store, "main")[-1].deed) == ("two", "roll back")


def test_a_fault_of_the_web_app_goes_back_once_and_then_asks_for_a_person(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.chats("one")
    back = check(scene.desk)
    assert (back.live, back.earlier) == ("two", ("three",))
    for _ in range(14):  # longer than the hour that is counted
        scene.later()
        scene.chats("two")
        with pytest.raises(VerificationFailed, match="look at the web app and its key"):
            check(scene.desk)
    assert history(scene.store, "main")[-1] == back
    scene.wrote("publish", "one", live="one", earlier=("two", "three"))
    scene.later()
    scene.chats("one")
    assert check(scene.desk).live == "two"  # published anew, it may go back again


def test_chats_that_fail_with_live_and_canary_alike_speak_against_neither(tmp_path: Path) -> None:
    scene = Scene(tmp_path, canary="three", canary_share=0.2)
    before = history(scene.store, "main")
    scene.chats("one")
    scene.chats("three")
    with pytest.raises(VerificationFailed, match="10 of 10 of the users' own chats failed"):
        check(scene.desk)
    assert history(scene.store, "main") == before


def test_what_the_web_app_may_name_yet_stays_loaded_and_what_answers_wrongly_does_not(tmp_path: Path) -> None:
    scene = Scene(tmp_path, canary="four", canary_share=0.2)
    scene.server.loaded.add("four")
    scene.chats("four")
    assert check(scene.desk).canary is None
    assert roll_back(scene.desk).live == "two"
    assert scene.server.loaded == {"one", "two", "three", "four"}
    scene.wrote("canary", "four", canary="four", canary_share=0.2)
    scene.server.deaf = {"one", "two", "three", "four"}
    with pytest.raises(VerificationFailed):
        check(scene.desk)
    assert scene.server.loaded == {"one", "two", "three"}


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every job may be published, and its files are at the server."""
    manifest = Manifest.model_construct(job_id="x", base_model="base", base_sha256="0" * 64)
    monkeypatch.setattr(publishing, "promotable", lambda *_, **__: Promotable(manifest))
    monkeypatch.setattr(publishing, "_carry", lambda *_: None)


def test_a_publication_unloads_what_no_web_app_can_name_any_more(tmp_path: Path, evaluated: None) -> None:
    scene = Scene(tmp_path)
    scene.wrote("publish", "three", outcome="failed")
    scene.wrote("publish", "two", outcome="failed")
    scene.wrote("canary", "four", canary="four", canary_share=0.2)
    scene.server.loaded |= {"four", "clients/brick/one"}
    done = publish(scene.desk, "three", newest(scene.store, "main").place)
    assert (done.live, done.earlier) == ("three", ("one", "two"))
    assert scene.server.loaded == {"one", "three", "four", "clients/brick/one"}


def test_a_canary_that_fails_the_proof_of_its_promotion_is_a_canary_no_more(tmp_path: Path, evaluated: None) -> None:
    scene = Scene(tmp_path)
    scene.wrote("canary", "four", canary="four", canary_share=0.2)
    scene.server.loaded.add("four")
    scene.server.deaf, scene.server.look = {"four"}, lambda: newest(scene.store, "main")
    with pytest.raises(VerificationFailed, match="one stays live"):
        publish(scene.desk, "four", newest(scene.store, "main").place)
    assert [(state.outcome, state.canary) for state in scene.server.unloaded_in] == [("begun", None)]
    state = newest(scene.store, "main")
    assert (state.live, state.outcome, state.canary, state.canary_share) == ("one", "failed", None, 0.0)
