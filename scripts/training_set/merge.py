"""From the pairs of a conversation to examples: one when merging changes nothing, else one per pair. Pure.

A pair repeats everything said before it. Where each pair's prompt begins with the previous pair's prompt and answer,
the last pair contains them all, and one example with several trained answers says the same in 2.0 to 2.4 times fewer
tokens. Each answer is then trained after exactly the text it was written for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """One answer and all that stood before it. `line` is where it was read."""

    line: int
    prompt: list[Message]
    target: str

    def whole(self) -> list[Message]:
        """The conversation up to and including the answer."""
        return [*self.prompt, {"role": "assistant", "content": self.target}]


@dataclass(frozen=True)
class Example:
    """A conversation as it will be trained: assistant messages with `trained` carry the loss."""

    line: int
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


def merged(pairs: Iterable[Pair]) -> Example | None:
    """The conversation as one example, or None where merging would change what an answer is trained after.

    `pairs` come in the order of their turns, without repetitions. One pair makes one example.
    """
    whole: list[Message] = []
    answers: list[int] = []
    line = 0
    for pair in pairs:
        if pair.prompt[: len(whole)] != whole or len(pair.prompt) == len(whole):
            return None
        line = line or pair.line
        answers.append(len(pair.prompt))
        whole = pair.whole()
    return Example(line, _trained(whole, answers))


def per_pair(pairs: Iterable[Pair]) -> Iterator[Example]:
    """Each pair as an example of its own, with only its own answer trained."""
    for pair in pairs:
        yield Example(pair.line, _trained(pair.whole(), [len(pair.prompt)]))


def per_answer(example: Example) -> Iterator[Example]:
    """One example per trained answer, cut after it: for chat templates that rewrite earlier turns."""
    plain = [{k: v for k, v in m.items() if k != "trained"} for m in example.messages]
    for at, message in enumerate(example.messages):
        if message.get("trained"):
            yield replace(example, messages=_trained(plain[: at + 1], [at]))


def without_repetitions(pairs: Iterable[Pair]) -> Iterator[tuple[Pair, bool]]:
    """Each pair and whether it repeats the one before it."""
    previous: Pair | None = None
    for pair in pairs:
        repeated = previous is not None and pair.prompt == previous.prompt and pair.target == previous.target
        yield pair, repeated
        previous = pair


def _trained(messages: list[Message], answers: list[int]) -> list[Message]:
    chosen = set(answers)
    return [m | {"trained": True} if i in chosen else m for i, m in enumerate(messages)]
