"""The canonical training set as token ids and masks of trained tokens."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from recipes.chat import Message, NotTrainable, Tokens, marked, tokenise
from trainer.failures import TrainingStopped
from trainer.fast_tokens import FastTokens, fast_tokens

CHECKED_MASKS = 20
"So many examples have their mask read back; one template error shows in the first."
COMPARED = 64
"So many examples, spread over a set, are tokenised both ways before the fast way is trusted with it."


@dataclass(frozen=True)
class Example:
    """One conversation. trained[i] says whether the loss is taken on predicting ids[i] from what precedes it."""

    id: str
    line: int
    ids: array[int]
    trained: bytes

    @property
    def predicted(self) -> list[int]:
        """Positions of the tokens that carry loss; the very first token has nothing before it to be predicted from."""
        return [i for i in range(1, len(self.ids)) if self.trained[i]]

    @property
    def trained_tokens(self) -> int:
        """How many tokens carry loss."""
        return sum(self.trained[1:])


class ChatTokens:
    """The base model's own tokenizer and chat template, as recipes.chat wants them."""

    def __init__(self, folder: Path) -> None:

        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if not self.tokenizer.chat_template:
            raise TrainingStopped(
                "bad_base_model", f"{folder}: its tokenizer has no chat template; use an instruct model"
            )
        pads = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        self.pad_id: int = next(pad for pad in pads if pad is not None)
        self.end_ids = frozenset({self.tokenizer.eos_token_id, *_generation_ends(folder)} - {None})

    @cached_property
    def fast(self) -> FastTokens | None:
        """The fast way to the same tokens, where this tokenizer and template have one."""
        return fast_tokens(self.tokenizer, self.render, self.end_ids)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool, tools: Any = None) -> str:
        """The conversation as the template writes it; a template that can think is told not to."""
        plain = [{key: value for key, value in message.items() if key != "trained"} for message in messages]
        text: str = self.tokenizer.apply_chat_template(
            plain, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt, enable_thinking=False
        )
        return text

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and the character span of each; the template writes the special tokens itself."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    def decode(self, ids: list[int]) -> str:
        """The text of the ids, special tokens included."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def proven_fast(path: Path, count: int, chat: ChatTokens) -> FastTokens | None:
    """The fast way to tokens, if it gives what the slow one gives on examples spread over the set; else None."""
    fast = chat.fast
    if fast is None or not path.is_file():
        return None
    with path.open("rb") as file:
        for line in islice(file, None, None, max(1, count // COMPARED)):
            try:
                row = json.loads(line)
                slow = _slow(row, chat)
            except (NotTrainable, ValueError, KeyError, TypeError, AttributeError):
                continue  # named when the whole set is read
            if (quick := _quick(row, fast)) and quick != slow:
                return None
    return fast


def read_examples(
    path: Path, sha256: str, count: int, chat: ChatTokens, max_tokens: int, fast: FastTokens | None = None
) -> list[Example]:
    """All examples of train.jsonl or valid.jsonl. Raises TrainingStopped (bad_data), naming up to 10 lines."""
    if not path.is_file():
        raise TrainingStopped("bad_data", f"{path}: missing")
    digest = hashlib.sha256()
    examples: list[Example] = []
    problems: list[str] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            digest.update(line)
            try:
                examples.append(_example(line, chat, fast, max_tokens, check=len(examples) < CHECKED_MASKS))
            except KeyError as error:
                problems.append(f"{path.name}: line {number}: field {error} is missing")
            except (NotTrainable, ValueError, TypeError, AttributeError) as error:
                problems.append(f"{path.name}: line {number}: {error}")
    if digest.hexdigest() != sha256:
        raise TrainingStopped("bad_data", f"{path.name}: its SHA-256 is not the one of launch.json; prepare it again")
    if problems:
        more = f" (and {len(problems) - 10} more)" if len(problems) > 10 else ""
        raise TrainingStopped("bad_data", "; ".join(problems[:10]) + more)
    if len(examples) != count:
        raise TrainingStopped("bad_data", f"{path.name}: {len(examples)} examples, launch.json says {count}")
    return examples


def _example(line: bytes, chat: ChatTokens, fast: FastTokens | None, max_tokens: int, check: bool) -> Example:
    row = json.loads(line)
    messages, name = row["messages"], str(row["id"])
    ids, trained = (_quick(row, fast) if fast else None) or _slow(row, chat)
    if len(ids) > max_tokens:
        raise NotTrainable(f"example '{name}' has {len(ids)} tokens; data.max_tokens is {max_tokens}")
    example = Example(name, int(row["line"]), ids, trained)
    if not example.trained_tokens:
        raise NotTrainable(f"example '{name}' has no trained token")
    if check:
        pieces = [
            text for text, is_trained in marked(Tokens(list(ids), [*map(bool, trained)]), chat.decode) if is_trained
        ]
        _refuse_wrong_mask(name, pieces, [m for m in messages if m.get("trained")])
    return example


def _slow(row: dict[str, Any], chat: ChatTokens) -> tuple[array[int], bytes]:
    tools = row.get("tools")
    tokens = tokenise(row["messages"], lambda m, prompt: chat.render(m, prompt, tools), chat.encode, chat.end_ids)
    return array("i", tokens.ids), bytes(tokens.trained)


def _quick(row: dict[str, Any], fast: FastTokens) -> tuple[array[int], bytes] | None:
    return None if row.get("tools") else fast.tokens(row["messages"])


def _refuse_wrong_mask(name: str, pieces: list[str], turns: list[Message]) -> None:
    """Reads the mask back: as many trained pieces as trained turns, each holding its turn's text."""
    for piece, turn in zip(pieces, turns, strict=False):
        text = turn.get("content") or ""
        if _plain(text) not in _plain(piece):
            raise NotTrainable(f"example '{name}': the mask marks {piece[:60]!r} instead of {text[:60]!r}")
    if len(pieces) != len(turns):
        raise NotTrainable(f"example '{name}': {len(pieces)} trained pieces for {len(turns)} trained messages")


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def _generation_ends(folder: Path) -> Iterator[int]:
    path = folder / "generation_config.json"
    ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    yield from [ends] if isinstance(ends, int) else ends or []
