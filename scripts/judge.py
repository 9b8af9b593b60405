"""Asks a judge, any model behind an OpenAI-compatible endpoint, which of two answers is better; twice, order swapped.

judgements = judge_answers(Judge(url, "gpt-5", key), scores.answers, httpx.Client())
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from recipes.evaluation import Answer, Judgement
from scripts.errors import InputError, Problem, ProviderError

_TIMEOUT_SECONDS = 120.0
_SAFE_URL = re.compile(r"^(https://|http://(127\.0\.0\.1|localhost|\[::1\])[:/])[^\s@]+$")
_TASK = (
    "Two assistants answered the same question; both answers may be cut short. Which answer is closer in content and"
    " manner to the reference? Reply with one letter: A, B, or C when neither is better."
)


@dataclass(frozen=True)
class Judge:
    """url: the base of the endpoint, such as https://api.openai.com/v1. Held-out conversations are sent there."""

    url: str
    model: str
    key: str = field(repr=False, default="")


def required_judge(url: str, model: str | None, key: str) -> Judge:
    """The judge, checked before anything is measured. Raises InputError."""
    problems = []
    if not _SAFE_URL.match(url):
        problems.append(Problem("--judge", ascii(url[:120]), "https://host/v1, or http:// on this machine"))
    if not model:
        problems.append(Problem("--judge-model", "missing", "the model's name at that endpoint"))
    if problems:
        raise InputError(*problems)
    return Judge(url.rstrip("/"), str(model), key)


def judge_answers(judge: Judge, answers: Sequence[Answer], http: httpx.Client) -> tuple[Judgement, ...]:
    """One judgement per answer. Raises ProviderError when the endpoint fails."""
    return tuple(_judged(judge, answer, http) for answer in answers)


def _judged(judge: Judge, answer: Answer, http: httpx.Client) -> Judgement:
    """Judges favour the first answer they read; only what survives a swap of the order counts."""
    straight = _ask(judge, answer, answer.base, answer.adapter, http)
    swapped = _ask(judge, answer, answer.adapter, answer.base, http)
    first: dict[str, Literal["adapter", "base", "neither"]] = {"A": "base", "B": "adapter"}
    second: dict[str, Literal["adapter", "base", "neither"]] = {"A": "adapter", "B": "base"}
    one, other = first.get(straight, "neither"), second.get(swapped, "neither")
    consistent = one == other and "" not in (straight, swapped)
    return Judgement(name=answer.name, preferred=one if consistent else "neither", consistent=consistent)


def _ask(judge: Judge, answer: Answer, a: str, b: str, http: httpx.Client) -> str:
    """ "A", "B", "C", or nothing when the reply holds no such letter."""
    text = f"Question:\n{answer.question}\n\nReference:\n{answer.wanted}\n\nAnswer A:\n{a}\n\nAnswer B:\n{b}"
    body = {
        "model": judge.model,
        "messages": [{"role": "system", "content": _TASK}, {"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 8,
    }
    headers = {"Authorization": f"Bearer {judge.key}"} if judge.key else {}
    want = "check --judge, --judge-model and LORRY_JUDGE_KEY, then try again"
    try:
        reply = http.post(f"{judge.url}/chat/completions", json=body, headers=headers, timeout=_TIMEOUT_SECONDS)
        said: Any = reply.json()
        if reply.status_code != 200:
            raise ProviderError(Problem(f"judge {judge.url}", f"HTTP {reply.status_code}", want))
        content = str(said["choices"][0]["message"]["content"])
    except httpx.HTTPError as error:
        raise ProviderError(Problem(f"judge {judge.url}", type(error).__name__, want)) from None
    except (ValueError, KeyError, IndexError, TypeError):
        raise ProviderError(Problem(f"judge {judge.url}", "not the answer of a chat completion", want)) from None
    found = re.search(r"\b([ABC])\b", content)
    return found[1] if found else ""
