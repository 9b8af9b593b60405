"""From a conversation to token ids and the mask of trained tokens, for any chat template and tokenizer given.

A canonical example, one line of train.jsonl or valid.jsonl:

    {"id": "c1", "line": 12, "messages": [{"role": "user", "content": "..."},
     {"role": "assistant", "content": "...", "trained": true}], "tools": [...]}

Only assistant messages may carry `"trained": true`; the loss is taken on their tokens and their end-of-turn token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
Render = Callable[[Sequence[Message], bool], str]
"(messages, add_generation_prompt) -> text. Tools are bound by the caller."
Encode = Callable[[str], tuple[list[int], list[tuple[int, int]]]]
"text -> (token ids, character span of each token); no special tokens added."


class NotTrainable(ValueError):
    """This conversation cannot be turned into trained tokens exactly; the sentence says why."""


@dataclass(frozen=True)
class Tokens:
    """`ids` and `trained`, both of the same length: trained[i] says whether the loss is taken on predicting ids[i]."""

    ids: list[int]
    trained: list[bool]


def tokenise(messages: Sequence[Message], render: Render, encode: Encode, end_ids: frozenset[int]) -> Tokens:
    """Token ids of the whole conversation and the mask of what is trained.

    The span of assistant turn i lies between render(messages[:i], generation prompt) and render(messages[:i+1]); both
    must be prefixes of the whole text, else the template rewrites earlier turns and no mask would be right. The span
    ends with its last end-of-turn token (`end_ids`): what the template writes after it (a newline) is never trained.

    Raises NotTrainable.
    """
    turns = [i for i, m in enumerate(messages) if m.get("trained")]
    if not turns:
        raise NotTrainable("it has no assistant message to train on")
    text = render(messages, False)
    ids, spans = encode(text)
    trained = [False] * len(ids)
    starts = [s for s, _ in spans]
    for i in turns:
        begin, end = _turn_span(messages, i, render, text)
        first, last = bisect_left(starts, begin), bisect_left(starts, end)
        if first > 0 and spans[first - 1][1] > begin:
            raise NotTrainable(f"message {i + 1} starts inside a token, so prompt and answer cannot be told apart")
        last = _after_end_of_turn(ids, first, last, end_ids)
        if first >= last:
            raise NotTrainable(f"message {i + 1} has no tokens to train on")
        trained[first:last] = [True] * (last - first)
    return Tokens(ids, trained)


def prefix_stable(render: Render) -> bool:
    """Whether the template leaves earlier assistant turns as they were when the conversation goes on.

    Where it does not (templates that drop old thoughts), a conversation is trained as one example per assistant turn.
    """
    probe: list[Message] = [
        {"role": "user", "content": "first question"},
        {"role": "assistant", "content": "first answer"},
        {"role": "user", "content": "second question"},
        {"role": "assistant", "content": "second answer"},
    ]
    text = render(probe, False)
    return all(text.startswith(render(probe[:n], False)) for n in (2, 4)) and text.startswith(render(probe[:1], True))


def marked(tokens: Tokens, decode: Callable[[list[int]], str]) -> list[tuple[str, bool]]:
    """The conversation as (text, is trained) pieces, for a preview and for checking a mask by reading it back."""
    pieces: list[tuple[str, bool]] = []
    start = 0
    for at in range(1, len(tokens.ids) + 1):
        if at == len(tokens.ids) or tokens.trained[at] != tokens.trained[start]:
            pieces.append((decode(tokens.ids[start:at]), tokens.trained[start]))
            start = at
    return pieces


def _turn_span(messages: Sequence[Message], i: int, render: Render, text: str) -> tuple[int, int]:
    before, after = render(messages[:i], True), render(messages[: i + 1], False)
    if not (text.startswith(before) and text.startswith(after) and after.startswith(before)):
        raise NotTrainable(
            f"the chat template rewrites message {i + 1} when later messages follow; make it an example of its own"
        )
    return len(before), len(after)


def _after_end_of_turn(ids: list[int], first: int, last: int, end_ids: frozenset[int]) -> int:
    """The index after the last end-of-turn token in ids[first:last]; `last` itself where the template writes none."""
    for at in range(last - 1, first - 1, -1):
        if ids[at] in end_ids:
            return at + 1
    return last
