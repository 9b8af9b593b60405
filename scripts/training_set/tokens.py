"""Tokens of an example: counted exactly by the model's own tokenizer, or estimated from its words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from recipes.chat import Message, NotTrainable, prefix_stable, tokenise
from scripts.tokenizer import ChatTokenizer
from scripts.training_set.findings import Unusable
from scripts.training_set.merge import Example

PER_WORD = 1.35  # English prose with the tokenizers of the models in recipes/models.yaml
JSON_BYTES = 3.5  # per token: brackets and quotes are tokens of their own
PER_MESSAGE = 4  # start, role, line break, end


class Count(NamedTuple):
    """Tokens of an example, and how many of them carry loss."""

    tokens: int
    trained: int


class Counter:
    """Counts with `tokenizer`, or estimates without one."""

    def __init__(self, tokenizer: ChatTokenizer | None) -> None:
        self.tokenizer = tokenizer
        self.exact = tokenizer is not None
        self.name = tokenizer.name if tokenizer else "estimate: 1.35 tokens per word"
        self.splits_answers = tokenizer is not None and not _keeps_earlier_turns(tokenizer)

    def count(self, example: Example) -> Count:
        """Raises Unusable where the chat template cannot tell what is trained."""
        if self.tokenizer is None:
            return _estimate(example)
        tokenizer, tools = self.tokenizer, example.tools

        def render(messages: Sequence[Message], generation: bool) -> str:
            return tokenizer.render(messages, generation, tools)

        try:
            tokens = tokenise(example.messages, render, tokenizer.encode, tokenizer.end_ids)
        except NotTrainable as error:
            raise Unusable(str(error), f"a conversation that the chat template of {tokenizer.name} takes") from None
        return Count(len(tokens.ids), sum(tokens.trained))

    def holds_control_tokens(self, example: Example) -> bool:
        """Whether a message contains what the model reads as the border of a turn, such as <|im_end|>."""
        words = self.tokenizer.control_tokens if self.tokenizer else ()
        return any(word in message["content"] for message in example.messages for word in words)


def _keeps_earlier_turns(tokenizer: ChatTokenizer) -> bool:
    try:
        return prefix_stable(lambda messages, generation: tokenizer.render(messages, generation, None))
    except NotTrainable:
        return False


def _estimate(example: Example) -> Count:
    tokens, trained = _of_json(example.tools), 0.0
    for message in example.messages:
        text = PER_WORD * len(message["content"].split()) + _of_json(message.get("tool_calls"))
        tokens += text + PER_MESSAGE
        trained += text + 1 if message.get("trained") else 0  # and the end of the turn
    return Count(round(tokens), round(trained))


def _of_json(value: object) -> float:
    return len(msgspec.json.encode(value)) / JSON_BYTES if value else 0.0
