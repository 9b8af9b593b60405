"""Signed webhooks: what is sent, when it is tried again, and that a kill between record and send loses nothing."""

from __future__ import annotations

import hashlib
import hmac
import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from scripts.callbacks import (
    FIRST_WAIT_SECONDS,
    MOST_TRIES,
    Delivery,
    are_over,
    deliver,
    due_tries,
    read_deliveries,
    wait_seconds,
)
from scripts.ears import Ears
from scripts.errors import ProviderError
from scripts.store import Store
from scripts.tick import open_jobs
from scripts.webhook import Webhook, signed_headers
from tests.money.conftest import SECRET, Place
from tests.money.jobs import HOUR, T0, Life
from tests.money.local_http import Headers, Receiver, Reply, listening

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("secret", "timestamp", "body", "signature"),
    [
        # printf '%s' '1790000000.{"id":"job-1"}' | openssl dgst -sha256 -hmac a-signing-secret
        (
            "a-signing-secret",
            1790000000,
            b'{"id":"job-1"}',
            "f1921957fbeb18c3ecd39c5ba5e3e919b82fd77d948c77aac7b94eb80ff67e66",
        ),
        ("other", 1, b"", "e483a94b47cd68b5cc2bfa0ea26ec0e4c0beb3c46f9af37131b221aef2e55da6"),
    ],
)
def test_the_signature_is_that_of_openssl(secret: str, timestamp: int, body: bytes, signature: str) -> None:
    headers = signed_headers(secret, "job-1.completed", body, timestamp)
    assert headers["lorry-signature"] == f"sha256={signature}"
    assert headers["lorry-timestamp"] == str(timestamp)
    assert headers["lorry-delivery"] == "job-1.completed"


def test_what_arrives_is_signed_over_the_very_bytes_and_holds_no_secret(
    place: Place, receiver: tuple[Receiver, Webhook]
) -> None:
    taken, webhook = receiver
    place.launch().completed(T0 + 60, since=T0)
    place.vanish()
    place.rest(60)
    place.tick(Ears(webhook))
    headers, body = taken.got[0]
    signed = f"{headers['lorry-timestamp']}.".encode() + body
    assert headers["lorry-signature"] == "sha256=" + hmac.new(SECRET.encode(), signed, hashlib.sha256).hexdigest()
    assert int(headers["lorry-timestamp"]) == int(place.clock.now())
    assert json.loads(body) == {
        "id": "job-1",
        "status": "COMPLETED",
        "error": None,
        "cost_usd": 0.0482,
        "model_files": ["adapter_config.json", "adapter_model.safetensors"],
    }
    assert SECRET.encode() not in body + str(headers).encode()


def test_tries_back_off_and_end_after_the_tenth_which_is_reported(
    place: Place, receiver: tuple[Receiver, Webhook]
) -> None:
    taken, webhook = receiver
    taken.status = 500
    life, said = place.launch(), []
    place.rest(60)
    life.failed(T0 + 60, since=T0)
    place.vanish()
    for number in range(1, MOST_TRIES + 1):
        said += place.tick(Ears(webhook)).done
        assert len(taken.got) == number
        place.rest(wait_seconds(number) - 1)
        place.tick(Ears(webhook))
        assert len(taken.got) == number
        place.rest(1)
    assert place.clock.now() - T0 > 4 * HOUR
    place.tick(Ears(webhook))
    assert len(taken.got) == MOST_TRIES
    assert len({headers["lorry-delivery"] for headers, _ in taken.got}) == 1
    assert said[-2] == (
        "job-1: webhook-failed: given up after 10 tries: "
        "webhook at 127.0.0.1: status 500; answer 200 once the message is taken"
    )
    assert said[-1] == "job-1: settled at $0.05 (bill)"
    assert open_jobs(place.store) == []


def test_a_receiver_that_is_up_again_is_told_and_then_left_alone(
    place: Place, receiver: tuple[Receiver, Webhook]
) -> None:
    taken, webhook = receiver
    taken.status = 503
    place.launch().completed(T0, since=T0)
    place.vanish()
    place.tick(Ears(webhook))
    taken.status = 204
    place.rest(FIRST_WAIT_SECONDS)
    assert place.tick(Ears(webhook)).done == ["job-1: webhook-completed: told at try 2"]
    place.rest(HOUR)
    place.tick(Ears(webhook))
    assert len(taken.got) == 2


def test_what_is_due_is_a_function_of_the_record_and_the_clock() -> None:
    assert [d.number for d in due_tries("failed", ("webhook", "supabase"), {}, 0.0)] == [1, 1]
    tried = {"webhook-failed": Delivery(2, last_at=1000.0, done=False)}
    assert due_tries("failed", ("webhook",), tried, 1059.9) == []
    assert [d.number for d in due_tries("failed", ("webhook",), tried, 1060.0)] == [3]
    for over in (Delivery(1, 0.0, done=True), Delivery(MOST_TRIES, 0.0, done=False)):
        assert due_tries("failed", ("webhook",), {"webhook-failed": over}, 1e12) == []
        assert are_over("failed", ("webhook",), {"webhook-failed": over})
    assert not are_over("completed", ("webhook",), tried)
    assert MOST_TRIES >= 8


def test_no_answer_and_a_redirect_are_failures_and_name_no_path(http: httpx.Client) -> None:
    closed = Webhook("http://127.0.0.1:9/hook?token=hidden", SECRET, http)
    with pytest.raises(ProviderError, match=r"webhook at 127\.0\.0\.1: no answer") as caught:
        closed.post("job-1.completed", {}, T0)
    assert "hidden" not in str(caught.value)
    moved = Receiver(status=302)
    with listening(moved.answer) as url, pytest.raises(ProviderError, match="status 302"):
        Webhook(url, SECRET, http).post("job-1.completed", {}, T0)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_kill_9_around_the_send_loses_nothing_and_keeps_the_delivery_id(store: Store, moment: str) -> None:
    taken = Receiver()
    Life(store, "job-1").submitted(T0).completed(T0 + 60, since=T0)
    with listening(taken.answer) as url:
        assert _ticked(store, url, T0 + 100, moment) == -9
        assert read_deliveries(store, "job-1")["webhook-completed"].tries == 1
        assert len(taken.got) == (0 if moment == "before" else 1)
        assert _ticked(store, url, T0 + 100 + FIRST_WAIT_SECONDS, "never") == 0
        assert len(taken.got) == (1 if moment == "before" else 2)
        assert read_deliveries(store, "job-1")["webhook-completed"].is_over
    assert {headers["lorry-delivery"] for headers, _ in taken.got} == {"job-1.completed"}
    assert len({body for _, body in taken.got}) == 1


def test_of_two_that_found_the_same_try_due_one_makes_it(store: Store) -> None:
    due = due_tries("failed", ("webhook",), {}, T0)[0]
    sent: list[int] = []
    answers = []

    def send() -> None:
        sent.append(1)
        answers.append(deliver(store, "job-1", due, send, T0))  # the other one, at the worst moment

    answers.append(deliver(store, "job-1", due, send, T0))
    assert len(sent) == 1
    assert [answer.done if answer else None for answer in answers] == [None, True]


def test_three_processes_at_once_make_each_try_once(store: Store) -> None:
    taken = Receiver(status=500)
    Life(store, "job-1").submitted(T0).completed(T0 + 60, since=T0)
    with listening(taken.answer) as url:
        racing = [_start(store, url, T0 + 100, "never") for _ in range(3)]
        assert [process.wait(60) for process in racing] == [0] * 3
    assert len(taken.got) == 1


def test_an_answer_that_comes_too_late_is_no_answer(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    over = threading.Event()

    def answer(method: str, target: str, headers: Headers, body: bytes) -> Reply:
        over.wait(5)
        return 200, {}

    monkeypatch.setattr("scripts.webhook.TIMEOUT", httpx.Timeout(0.2))
    with listening(answer) as url:
        try:
            with pytest.raises(ProviderError, match="no answer \\(ReadTimeout\\)"):
                Webhook(url, SECRET, http).post("job-1.completed", {}, T0)
        finally:
            over.set()


def _start(store: Store, url: str, now: float, kill: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.money.ticking", store.url, url, str(now), kill]
    return subprocess.Popen(command, cwd=REPOSITORY)


def _ticked(store: Store, url: str, now: float, kill: str) -> int:
    return _start(store, url, now, kill).wait(60)
