"""The fast way to tokens gives what the slow one gives, byte for byte, or is not taken."""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from recipes.chat import NotTrainable, tokenise
from tests.trainer.test_data import write
from trainer.data import ChatTokens, proven_fast, read_examples

pytest.importorskip("tiktoken")

MARKS = ("<|im_end|>", "<|im_start|>assistant\n", "</think>", "\n\n", " ", "\r\n", "\t", "'s", "don't", "1234")
LETTERS = ("\u0301", "e\u0301", "\u1e9b\u0323", "\U0001f6b2", "\u0130")
ODD = st.sampled_from([*MARKS, *LETTERS])
CONTENT = st.lists(ODD | st.text(max_size=12) | st.text("abc \n", max_size=12), min_size=1, max_size=6).map("".join)


@pytest.fixture(scope="module")
def chat(smoke_model: Path) -> ChatTokens:
    return ChatTokens(smoke_model)


@pytest.fixture
def other(smoke_model: Path, tmp_path: Path) -> Callable[..., ChatTokens]:
    """The smoke model's tokenizer files with one of them changed."""

    def make(name: str, change: Callable[[str], str]) -> ChatTokens:
        folder = tmp_path / "other"
        shutil.copytree(smoke_model, folder)
        file = folder / name
        file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")
        return ChatTokens(folder)

    return make


def slow(chat: ChatTokens, messages: list[dict[str, Any]]) -> tuple[array[int], bytes]:
    tokens = tokenise(messages, chat.render, chat.encode, chat.end_ids)
    return array("i", tokens.ids), bytes(tokens.trained)


def test_every_conversation_of_a_plain_set_goes_the_fast_way_and_comes_out_the_same(
    chat: ChatTokens, jobs: Any, tmp_path: Path
) -> None:
    rows = jobs.conversations(60, seed=7, uneven=True)
    for source in rows:
        assert chat.fast.tokens(source["messages"]) == slow(chat, source["messages"])
    written = write(tmp_path / "train.jsonl", rows)
    fast = proven_fast(written[0], 60, chat)
    assert fast is chat.fast
    assert read_examples(*written, chat, 1024, fast) == read_examples(*written, chat, 1024)


@settings(max_examples=300, deadline=None)
@given(contents=st.lists(CONTENT, min_size=2, max_size=5), system=st.booleans(), trained=st.integers(1, 7))
def test_whatever_is_said_the_fast_way_agrees_or_steps_aside(
    chat: ChatTokens, contents: list[str], system: bool, trained: int
) -> None:
    roles = [*(["system"] if system else []), *["user", "assistant"] * 3]
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    for number, message in enumerate(m for m in messages if m["role"] == "assistant"):
        message |= {"trained": True} if trained >> number & 1 else {}
    quick = chat.fast.tokens(messages)
    try:
        expected = slow(chat, messages)
    except NotTrainable:
        assert quick is None
        return
    assert quick in (None, expected)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "trained": True, "tool_calls": []}],
        [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "e\u0301", "trained": True}],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "nothing to learn"}],
    ],
)
def test_what_it_does_not_know_it_leaves_to_the_slow_way(chat: ChatTokens, messages: list[dict[str, Any]]) -> None:
    assert chat.fast.tokens(messages) is None


def test_a_template_of_another_kind_has_no_fast_way(other: Any) -> None:
    def shout(text: str) -> str:
        return text.replace("{{- content }}", "{{- content | upper }}")

    assert other("chat_template.jinja", shout).fast is None


def test_a_tokenizer_that_normalises_otherwise_has_no_fast_way(smoke_model: Path) -> None:
    chat = ChatTokens(smoke_model)
    chat.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert chat.fast is None


def test_merges_in_another_order_than_the_numbers_of_tokens_are_caught_by_the_sample(
    other: Any, jobs: Any, tmp_path: Path
) -> None:
    """tiktoken merges by token number, tokenizers by the list of merges; only a comparison shows that they differ."""

    def reverse(text: str) -> str:
        described = json.loads(text)
        described["model"]["merges"].reverse()
        return json.dumps(described)

    chat, written = other("tokenizer.json", reverse), write(tmp_path / "train.jsonl", jobs.conversations(9))
    assert chat.fast is not None
    assert proven_fast(written[0], 9, chat) is None
    assert len(read_examples(*written, chat, 1024, None)) == 9
