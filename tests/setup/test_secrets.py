"""Secrets on Runpod's side: found by their references, set from the environment, never shown."""

from __future__ import annotations

import json

import pytest

from scripts.errors import InputError
from scripts.fake_runpod.server import Fault
from scripts.secrets import check_secrets, set_secrets, variable_of

CANARY = "hf_CANARY_4b1d"
HF, TOKEN = "RUNPOD_SECRET_lorry_hf_token", "RUNPOD_SECRET_job_token"


@pytest.fixture
def referred(api):
    """A template and an endpoint that refer to two secrets."""
    env = {"HF_TOKEN": "{{ RUNPOD_SECRET_lorry_hf_token }}", "PLAIN": "x"}
    api.create("templates", {"name": "lorry-dev-pod", "image": "i", "env": env})
    api.create(
        "serverless",
        {
            "name": "lorry-dev-training",
            "type": "QUEUE",
            "image": "i",
            "gpu": {"pools": ["HOPPER_141"]},
            "scaling": {"type": "QUEUE_DELAY", "queueDelay": 4},
            "env": env | {"JOB": "{{RUNPOD_SECRET_job_token}}"},
        },
    )


def test_references_are_found_and_values_come_from_the_environment(referred, lorry, runpod, monkeypatch, seen, caplog):
    monkeypatch.setenv(HF, CANARY)
    first = lorry("secrets")
    assert first.code == 4
    assert first.out.splitlines() == [
        "missing  job_token  for lorry-dev-training",
        "created  lorry_hf_token  for lorry-dev-pod, lorry-dev-training",
    ]
    assert first.error == (
        f"job_token: no such secret, and no value in {TOKEN}; set the variable and run `lorry secrets`\n"
    )
    monkeypatch.setenv(TOKEN, CANARY + "2")
    assert [line[:8] for line in lorry("secrets").out.splitlines()] == ["created ", "updated "]
    monkeypatch.delenv(HF)
    assert [line[:8] for line in lorry("secrets").out.splitlines()] == ["updated ", "present "]
    assert lorry("secrets", "--check").code == 0

    told = [(method, path.rpartition("/")[0]) for method, path, body in runpod.log if CANARY in body]
    assert set(told) == {("POST", "/v2/account"), ("PATCH", "/v2/account/secrets")}
    seen += [first.out, first.error, json.dumps([entry[:2] for entry in runpod.log])]
    assert CANARY not in "".join(seen) + caplog.text


def test_check_changes_nothing(referred, lorry, runpod, monkeypatch):
    monkeypatch.setenv(HF, CANARY)
    done = lorry("secrets", "--check", "--json")
    assert done.code == 4
    rows = {row["name"]: (row["state"], row["variable"], row["used_by"]) for row in json.loads(done.out)}
    assert rows["lorry_hf_token"] == ("missing", HF, ["lorry-dev-pod", "lorry-dev-training"])
    assert runpod.account.held["secrets"] == {}
    assert {method for method, path, _ in runpod.log if "secrets" in path} == {"GET"}


def test_a_secret_may_be_set_before_anything_refers_to_it(api, lorry, monkeypatch):
    monkeypatch.setenv("RUNPOD_SECRET_new_one", CANARY)
    assert lorry("secrets", "new-one").out == "created  new-one\n"
    assert lorry("secrets").out == "no template and no endpoint refers to a secret\n"


def test_a_refused_value_is_not_repeated_in_the_error(referred, lorry, runpod, monkeypatch, caplog):
    monkeypatch.setenv(HF, CANARY)
    runpod.faults.append(Fault("POST", "/account/secrets", 422, f"value '{CANARY}' is not allowed"))
    done = lorry("secrets")
    assert done.error == (
        "Runpod: POST /account/secrets: status 422: its words are not shown, since they may repeat the secret; "
        "correct the value it names; nothing was changed\n"
    )
    assert CANARY not in done.out + caplog.text


def test_a_create_whose_answer_is_lost_is_completed_by_the_next_run(referred, lorry, runpod, monkeypatch):
    monkeypatch.setenv(HF, CANARY)
    monkeypatch.setenv(TOKEN, CANARY)
    runpod.faults.append(Fault("POST", "/account/secrets", 0))
    first = lorry("secrets")
    assert "it may have been carried out: look before you repeat it" in first.error
    assert lorry("secrets").code == 0
    assert sorted(row["name"] for row in runpod.account.held["secrets"].values()) == ["job_token", "lorry_hf_token"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("{{ RUNPOD_SECRET_x }}", "its value begins with {{; the secret itself, no reference"),
        (f" {CANARY}", "it begins or ends with white space; the bare value"),
        (f"{CANARY}\n", "it begins or ends with white space; the bare value"),
        ("x" * 2**24, "it is longer than 16 MiB; a shorter value"),
    ],
)
def test_what_cannot_be_a_value_is_refused_before_anything_is_sent(value, said, referred, api, runpod):
    with pytest.raises(InputError) as caught:
        set_secrets(api, {HF: value}.get)
    assert str(caught.value) == f"{HF}: {said}"
    assert runpod.account.held["secrets"] == {}


@pytest.mark.parametrize("name", ["RUNPOD_KEY", "1st", "", "two words", "x" * 200])
def test_what_cannot_be_a_name_is_refused(name, api):
    with pytest.raises(InputError, match="cannot be the name of a secret"):
        check_secrets(api, [name])


def test_a_name_with_dots_and_slashes_has_a_variable_that_a_shell_can_set():
    assert variable_of("team/hf.token-2") == "RUNPOD_SECRET_team_hf_token_2"


def test_without_a_key_the_next_step_is_said(lorry, monkeypatch):
    monkeypatch.delenv("RUNPOD_API_KEY")
    done = lorry("secrets")
    assert (done.code, done.error) == (2, "RUNPOD_API_KEY: not set; a Runpod key with read and write access\n")
