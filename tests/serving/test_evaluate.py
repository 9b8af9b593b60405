"""The gate: an adapter is measured for real, held against the recipe's limits, and goes live only when it passes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipes.evaluation import Answer, Assessment, Override, Scores, TextScore, general_questions, perplexity
from recipes.job import LaunchSpec, read_record, write_record
from recipes.recipe import Evaluation
from scripts.errors import InputError, NotFound, ProviderError, Refused
from scripts.evaluate import assess, evaluate, promotable
from scripts.judge import Judge, judge_answers, required_judge
from scripts.store import open_store


def scores(held_out: tuple[float, float] = (3.0, 2.5), general: tuple[float, float] = (2.0, 2.0)) -> Scores:
    """Two texts each of 10 and 30 tokens with these losses per token."""
    return Scores(
        job_id="job-1",
        adapter_sha256={"a": "1"},
        base_sha256="2",
        general_sha256=general_questions()[1],
        held_out=tuple(
            TextScore(name=f"c{n}", tokens=n, base=held_out[0] * n, adapter=held_out[1] * n) for n in (10, 30)
        ),
        held_out_total=2,
        general=tuple(TextScore(name=f"q{n}", tokens=n, base=general[0] * n, adapter=general[1] * n) for n in (10, 30)),
        answers=tuple(Answer(name=f"c{n}", question="Q", wanted="W", base=f"b{n}", adapter=f"a{n}") for n in range(4)),
        answer_tokens=8,
        seconds=1.0,
    )


def test_losses_are_per_token_and_not_per_conversation() -> None:
    uneven = scores().model_copy(
        update={
            "held_out": (
                TextScore(name="long", tokens=90, base=90.0, adapter=45.0),
                TextScore(name="short", tokens=10, base=50.0, adapter=50.0),
            )
        }
    )
    found = assess(Evaluation(), uneven, None, (), 0.0)
    assert found.held_out_base == pytest.approx(140 / 100)
    assert found.held_out_adapter == pytest.approx(95 / 100)


@pytest.mark.parametrize(
    ("limits", "held_out", "general", "reason"),
    [
        (Evaluation(), (3.0, 2.5), (2.0, 2.0), None),
        (Evaluation(), (3.0, 3.0), (2.0, 2.0), "held-out loss 3.0000 to 3.0000: it must fall by more than 0"),
        (Evaluation(min_gain=0.6), (3.0, 2.5), (2.0, 2.0), "it must fall by more than 0.6"),
        (Evaluation(), (3.0, 2.5), (2.0, 2.09), None),
        (
            Evaluation(),
            (3.0, 2.5),
            (2.0, 2.2),
            "loss on general questions 2.0000 to 2.2000: it may rise by at most 0.1",
        ),
        (Evaluation(), (3.0, math.nan), (2.0, 2.0), "it must fall"),
        (Evaluation(), (3.0, 2.5), (2.0, math.nan), "it may rise by at most"),
        (Evaluation(min_win_rate=0.5), (3.0, 2.5), (2.0, 2.0), "no judge was asked"),
    ],
)
def test_a_limit_that_is_not_kept_is_a_reason(
    limits: Evaluation, held_out: tuple[float, float], general: tuple[float, float], reason: str | None
) -> None:
    found = assess(limits, scores(held_out, general), None, (), 0.0)
    assert found.passed == (reason is None)
    assert reason is None or reason in found.reasons[0]


def test_without_held_out_conversations_nothing_passes() -> None:
    found = assess(Evaluation(), scores().model_copy(update={"held_out": ()}), None, (), 0.0)
    assert "no conversation was held out" in found.reasons[0]


def test_perplexity_of_a_uniform_guess_is_the_number_of_choices() -> None:
    assert perplexity(math.log(400)) == pytest.approx(400)
    assert perplexity(1e6) == math.inf


def _judge_by(choose: Callable[[str, str], str]) -> Callable[[Any], tuple[int, Any]]:
    """An endpoint that answers with choose(answer A, answer B)."""

    def answer(body: Any) -> tuple[int, Any]:
        text = body["messages"][1]["content"]
        a, b = text.split("Answer A:\n")[1].split("\n\nAnswer B:\n")
        return 200, {"choices": [{"message": {"content": choose(a, b)}}]}

    return answer


@pytest.mark.parametrize(
    ("choose", "rate"),
    [
        (lambda a, b: "A" if a.startswith("a") else "B", 1.0),
        (lambda a, b: "A" if a.startswith("b") else "B", 0.0),
        (lambda a, b: "A", 0.5),
        (lambda a, b: "B", 0.5),
        (lambda a, b: "C", 0.5),
        (lambda a, b: "no idea", 0.5),
    ],
    ids=["prefers adapter", "prefers base", "always first", "always second", "equal", "no letter"],
)
def test_a_judge_that_follows_the_order_of_answers_counts_for_nobody(
    choose: Callable[[str, str], str], rate: float, http_server: Any
) -> None:
    import httpx

    told = http_server(_judge_by(choose))
    with httpx.Client() as http:
        judgements = judge_answers(Judge(told.url, "j", "secret-key"), scores().answers, http)
    found = assess(Evaluation(min_win_rate=0.6), scores(), "j", judgements, 0.0)
    assert found.win_rate == rate
    assert found.passed == (rate >= 0.6)
    assert len(told.requests) == 8
    assert {headers["Authorization"] for _, headers, _ in told.requests} == {"Bearer secret-key"}


@pytest.mark.parametrize(
    ("status", "reply"), [(500, {}), (200, {"choices": []}), (200, []), (401, {"error": "secret-key is wrong"})]
)
def test_a_judge_that_fails_is_an_error_that_holds_no_key(status: int, reply: Any, http_server: Any) -> None:
    import httpx

    told = http_server(lambda body: (status, reply))
    with httpx.Client() as http, pytest.raises(ProviderError) as caught:
        judge_answers(Judge(told.url, "j", "secret-key"), scores().answers, http)
    assert "secret-key" not in str(caught.value)
    assert "secret-key" not in repr(Judge(told.url, "j", "secret-key"))


@pytest.mark.parametrize("url", ["http://example.com/v1", "ftp://x", "https://user@host/v1", "example.com"])
def test_conversations_go_to_no_judge_in_the_clear(url: str) -> None:
    with pytest.raises(InputError, match="https://host/v1"):
        required_judge(url, "m", "")


def test_a_trained_adapter_is_measured_and_passes_and_its_report_shows_both_answers(desk: Any) -> None:
    """Without a measurement from the machine that trained, it is made here, by the trainer's own verb."""
    before = read_record(Scores, desk.job("good-1") / "scores.json")
    (desk.job("good-1") / "scores.json").unlink()
    done = desk.lorry("evaluate", "good-1")
    assert done.returncode == 0, done.stdout + done.stderr
    found = read_record(Assessment, desk.job("good-1") / "evaluation.json")
    measured = read_record(Scores, desk.job("good-1") / "scores.json")
    assert found is not None
    assert measured is not None
    assert before is not None
    assert [s.name for s in before.held_out] == [s.name for s in measured.held_out]
    assert [s.adapter for s in before.held_out] == pytest.approx([s.adapter for s in measured.held_out], rel=1e-4)
    assert [s.base for s in before.general] == pytest.approx([s.base for s in measured.general], rel=1e-4)
    assert found.passed
    assert found.held_out_adapter < found.held_out_base - 0.05
    assert found.base_sha256 == measured.base_sha256
    assert [s.tokens > 0 for s in measured.held_out] == [True] * 4
    assert len(measured.general) == len(general_questions()[0])
    page = (desk.job("good-1") / "report.html").read_text()
    assert "Answers side by side" in page
    assert "Evaluation <span class='good'>passed" in page
    assert promotable(open_store(desk.store.as_uri()), "good-1").override is None


def test_an_adapter_that_was_never_measured_and_whose_set_is_erased_is_refused_with_the_reason(desk: Any) -> None:
    (desk.job("good-1") / "scores.json").unlink()
    (desk.job("good-1") / "data_erased.json").write_text("{}")
    with pytest.raises(Refused, match="its training set was erased as its recipe asks"):
        evaluate(open_store(desk.store.as_uri()), "good-1", desk.models, os.environ, now=1.0)


def test_the_losses_are_those_of_the_trainers_own_probe(desk: Any) -> None:
    """The measured loss of a held-out conversation equals the mean of the recorded log-probabilities of its tokens."""
    from trainer.probe import read_probe

    measured = read_record(Scores, desk.job("good-1") / "scores.json")
    assert measured is not None
    conversations, base, trained = read_probe(desk.job("good-1") / "probe.safetensors")
    for said, of in ((base, "base"), (trained, "adapter")):
        for score, (ids, positions), logs in zip(measured.held_out, conversations, said, strict=True):
            if len(positions) == score.tokens:  # the probe looked at every answer token
                total = -sum(float(row[ids[p + 1]]) for row, p in zip(logs, positions, strict=True))
                assert getattr(score, of) == pytest.approx(total, rel=1e-4)


def test_a_job_in_a_bucket_or_a_disk_is_not_promoted_unevaluated(desk: Any) -> None:
    store = open_store(desk.store.as_uri())
    with pytest.raises(Refused, match="not evaluated"):
        promotable(store, "good-1")
    with pytest.raises(NotFound):
        promotable(store, "nobody-1")


def test_an_evaluation_of_another_adapter_or_other_limits_counts_for_nothing(desk: Any) -> None:
    store = open_store(desk.store.as_uri())
    assert desk.lorry("evaluate", "good-1").returncode == 0
    path = desk.job("good-1") / "evaluation.json"
    own = path.read_bytes()
    other = {"adapter_sha256": {"adapter_config.json": "1", "adapter_model.safetensors": "2"}}
    path.write_text(json.dumps(json.loads(own) | other))
    with pytest.raises(Refused, match="of another adapter"):
        promotable(store, "good-1")
    path.write_bytes(own)
    spec = read_record(LaunchSpec, desk.job("good-1") / "launch.json")
    assert spec is not None
    stricter = spec.recipe.model_copy(update={"evaluation": Evaluation(min_gain=5.0)})
    write_record(desk.job("good-1") / "launch.json", spec.model_copy(update={"recipe": stricter}))
    with pytest.raises(Refused, match="other limits"):
        promotable(store, "good-1")
    again = desk.lorry("evaluate", "good-1")
    assert again.returncode == 3
    assert "it must fall by more than 5" in again.stdout
    with pytest.raises(Refused, match="must fall by more than 5"):
        promotable(store, "good-1")


def test_an_override_needs_a_reason_and_is_recorded(desk: Any) -> None:
    store = open_store(desk.store.as_uri())
    with pytest.raises(InputError, match="the reason"):
        promotable(store, "good-1", override="  ", by="ann", now=5.0)
    allowed = promotable(store, "good-1", override="the client asked for it today", by="ann", now=5.0)
    record = read_record(Override, desk.job("good-1") / "override.json")
    assert record == allowed.override
    assert record is not None
    assert (record.by, record.failed) == ("ann", ("not evaluated",))


def test_without_the_base_model_the_refusal_says_where_to_evaluate(desk: Any, tmp_path: Path) -> None:
    spec = json.loads((desk.job("good-1") / "launch.json").read_text())
    assert desk.lorry("evaluate", "good-1", LORRY_MODELS=str(tmp_path)).returncode == 0  # the proof has measured it
    (desk.job("good-1") / "scores.json").unlink()
    spec["recipe"]["base"]["id"] = "Qwen/Qwen3-8B"
    (desk.job("good-1") / "launch.json").write_text(json.dumps(spec))
    done = desk.lorry("evaluate", "good-1", LORRY_MODELS=str(tmp_path))
    assert done.returncode == 3
    assert "run it on a machine that holds Qwen/Qwen3-8B" in done.stderr
    assert "Traceback" not in done.stderr
