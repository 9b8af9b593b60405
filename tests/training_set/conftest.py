"""Shared by the training-set tests: writes a training set, prepares it, reads back what was written."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from recipes.preparation import TrainingSetReport
from recipes.recipe import Data
from scripts.tokenizer import ChatTokenizer, find_tokenizer
from scripts.training_set import prepare

FORMS = Path(__file__).parent.parent.parent / "examples" / "forms"


class Prepared(NamedTuple):
    """A report and the canonical examples of both sides."""

    report: TrainingSetReport
    train: list[dict[str, Any]]
    valid: list[dict[str, Any]]

    @property
    def examples(self) -> list[dict[str, Any]]:
        """Both sides together."""
        return self.train + self.valid

    @property
    def answers(self) -> list[str]:
        """Every trained answer."""
        return [m["content"] for e in self.examples for m in e["messages"] if m.get("trained")]


Run = Callable[..., Prepared]


def _run(
    content: Any,
    name: str = "set.jsonl",
    *,
    seed: int = 1,
    tokenizer: ChatTokenizer | None = None,
    **data: Any,
) -> Prepared:
    """`content` is a path, bytes, or a list of rows to write as JSON Lines."""
    with tempfile.TemporaryDirectory() as folder:
        source = content if isinstance(content, Path) else Path(folder) / name
        if isinstance(content, bytes):
            source.write_bytes(content)
        elif not isinstance(content, Path):
            source.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        out = Path(folder) / "out"
        report = prepare(source, out, Data(**data), seed, tokenizer)
        sides = [
            [json.loads(line) for line in (out / side).read_text(encoding="utf-8").splitlines()]
            for side in ("train.jsonl", "valid.jsonl")
        ]
        assert sorted(path.name for path in out.iterdir()) == ["report.json", "train.jsonl", "valid.jsonl"]
        return Prepared(report, *sides)


@pytest.fixture(scope="session")
def run() -> Run:
    """Prepares a training set given as a path, bytes, or rows."""
    return _run


@pytest.fixture(scope="session")
def smoke() -> ChatTokenizer:
    """The smoke model's tokenizer."""
    found = find_tokenizer("lorry/smoke", [])
    assert found is not None
    return found


@pytest.fixture(scope="session")
def make_pairs() -> Callable[..., list[dict[str, Any]]]:
    """Rows of form (b) for one conversation, from its messages: user, assistant, user, ..."""

    def pairs(name: str, *texts: str, system: str | None = "You explain bicycle care.") -> list[dict[str, Any]]:
        rows = []
        for at in range(0, len(texts) - 1, 2):
            history = [
                {"turn": n + 1, "role": "user" if n % 2 == 0 else "assistant", "content": text, "emotional_state": {}}
                for n, text in enumerate(texts[: at + 1])
            ]
            rows.append(
                {
                    "id": f"{name}-{at + 2}",
                    "conversation_id": name,
                    "turn_number": at + 2,
                    "system_prompt": system,
                    "conversation_history": history,
                    "current_user_input": texts[at],
                    "target_response": texts[at + 1],
                }
            )
        return rows

    return pairs
