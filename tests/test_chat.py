"""The mask of trained tokens, on templates in the shapes that are in use."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.chat import Message, NotTrainable, marked, prefix_stable, tokenise

END = 1
_PIECES = re.compile(r"<end>|<[a-z]+>|\s|[^\s<]+|<")


def chatml(messages: Sequence[Message], add_generation_prompt: bool) -> str:
    text = "".join(f"<{m['role']}>\n{m['content']}<end>\n" for m in messages)
    return text + ("<assistant>\n" if add_generation_prompt else "")


def forgetful(messages: Sequence[Message], add_generation_prompt: bool) -> str:
    """Opens every last answer with a thought and drops it once another message follows."""
    parts = []
    for at, m in enumerate(messages):
        thought = "<think>" if m["role"] == "assistant" and at == len(messages) - 1 else ""
        parts.append(f"<{m['role']}>\n{thought}{m['content']}<end>\n")
    return "".join(parts) + ("<assistant>\n" if add_generation_prompt else "")


class Words:
    """A tokenizer of words, marks and spaces, with the spans a real one gives."""

    def __init__(self) -> None:
        self.names = {"<end>": END}

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        found = list(_PIECES.finditer(text))
        ids = [self.names.setdefault(m.group(), len(self.names) + 1) for m in found]
        return ids, [m.span() for m in found]

    def decode(self, ids: list[int]) -> str:
        names = {number: name for name, number in self.names.items()}
        return "".join(names[i] for i in ids)


def talk(*texts: str, trained: Sequence[int] | None = None) -> list[Message]:
    messages: list[Message] = [{"role": ("user", "assistant")[n % 2], "content": t} for n, t in enumerate(texts)]
    for n in range(1, len(texts), 2):
        messages[n]["trained"] = trained is None or n in trained
    return messages


def test_only_the_answers_and_their_end_mark_are_trained() -> None:
    words = Words()
    tokens = tokenise(talk("hello there", "hi you", "and now", "bye"), chatml, words.encode, frozenset({END}))
    pieces = [text for text, trained in marked(tokens, words.decode) if trained]
    assert pieces == ["hi you<end>", "bye<end>"]


def test_the_newline_after_the_end_mark_is_not_trained() -> None:
    words = Words()
    tokens = tokenise(talk("a", "b"), chatml, words.encode, frozenset({END}))
    assert words.decode([i for i, t in zip(tokens.ids, tokens.trained, strict=True) if t]) == "b<end>"


def test_a_message_with_weight_zero_is_not_trained() -> None:
    words = Words()
    tokens = tokenise(talk("a", "b", "c", "d", trained=[3]), chatml, words.encode, frozenset({END}))
    assert [t for t, yes in marked(tokens, words.decode) if yes] == ["d<end>"]


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(NotTrainable, match="no assistant message"):
        tokenise(talk("a", "b", trained=[]), chatml, Words().encode, frozenset({END}))


def test_a_template_that_rewrites_old_answers_is_noticed_and_refused() -> None:
    assert prefix_stable(chatml)
    assert not prefix_stable(forgetful)
    with pytest.raises(NotTrainable, match="rewrites message 2"):
        tokenise(talk("a", "b", "c", "d"), forgetful, Words().encode, frozenset({END}))


def test_a_template_that_rewrites_old_answers_can_train_the_last_one() -> None:
    words = Words()
    tokens = tokenise(talk("a", "b", "c", "d", trained=[3]), forgetful, words.encode, frozenset({END}))
    assert [t for t, yes in marked(tokens, words.decode) if yes] == ["<think>d<end>"]


def test_a_token_across_the_border_is_refused() -> None:
    def glued(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        return [7, 8], [(0, len(text) - 8), (len(text) - 8, len(text))]

    with pytest.raises(NotTrainable, match="starts inside a token"):
        tokenise(talk("aaaa", "bbbbbbbb"), chatml, glued, frozenset({END}))


texts = st.text(alphabet="ab <\n", min_size=1, max_size=12).filter(lambda t: t.strip() != "")


@given(st.lists(texts, min_size=2, max_size=8))
def test_what_is_trained_reads_back_as_the_answers(contents: list[str]) -> None:
    words = Words()
    messages = talk(*contents)
    tokens = tokenise(messages, chatml, words.encode, frozenset({END}))
    back = [t for t, yes in marked(tokens, words.decode) if yes]
    assert back == [m["content"] + "<end>" for m in messages if m.get("trained")]
