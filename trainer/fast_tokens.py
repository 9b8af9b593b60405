"""Conversations to token ids and exact masks several times faster than tokenizers does it, or not at all.

tiktoken encodes the same vocabulary many times faster but gives no offsets. It needs none: the running sum of the
tokens' bytes says where each ends, and two binary searches a turn find what the assistant said. The text is put
together from what a template writes around contents, learned once. Contents a template might treat in a way of their
own (spaces at the ends, marks such as <think>) are rendered too, and must come out the same. What does not fit takes
the slow path, and the slow path decides on a sample of each set whether this one may be used at all.
"""

from __future__ import annotations

import importlib.util
import json
import re
import unicodedata
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

from recipes.chat import Message, NotTrainable, Render

KNOWN = {"role", "content", "trained"}
PROBES = (("user", "assistant", "user", "assistant"), ("system", "user", "assistant"))
"Orders of roles from which the pieces are learned."


@dataclass(frozen=True)
class FastTokens:
    """One model's fast path. `pieces[a, b]` stands between the contents of a message of role a and the next, of b."""

    encode: Callable[[str], Any]
    lengths: Any
    "Bytes of each token."
    pieces: dict[tuple[str, str], str]
    marks: re.Pattern[str]
    "Found in every content that holds a mark the template knows, such as <think>, and in few others."
    render: Render
    end_ids: frozenset[int]

    def tokens(self, messages: Sequence[Message]) -> tuple[array[int], bytes] | None:
        """(ids, mask); None for a conversation that must take the slow path."""
        laid = self._text(messages)
        if laid is None:
            return None
        text, spans = laid
        ids = self.encode(text)
        ends = self.lengths[ids].cumsum()
        mask = np.zeros(len(ids), np.uint8)
        borders = np.array(spans)
        at = ends.searchsorted(borders)
        # Each must be a token's border, and an end of turn must follow what was said.
        if (ends[at] != borders).any() or not self.end_ids.issuperset(ids[at[:, 1] + 1].tolist()):
            return None
        for first, last in at.tolist():
            mask[first + 1 : last + 2] = 1
        return array("i", ids.tobytes()), mask.tobytes()

    def _text(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]] | None:
        """The text and the byte spans of the trained contents."""
        parts: list[str] = []
        spans, at, before, is_odd = [], 0, "", False
        for message in messages:
            role, content = str(message.get("role")), message.get("content")
            piece = self.pieces.get((before, role))
            if piece is None or not isinstance(content, str) or not content or not KNOWN.issuperset(message):
                return None
            is_odd = is_odd or self.marks.search(content) is not None or content[0].isspace() or content[-1].isspace()
            begin = at + _bytes(piece)
            at, before = begin + _bytes(content), role
            parts += (piece, content)
            if message.get("trained"):
                spans.append((begin, at))
        tail = self.pieces.get((before, ""))
        text = "".join(parts) + (tail or "")
        whole = tail is not None and unicodedata.is_normalized("NFC", text)
        if not (whole and spans) or (is_odd and text != self.render(messages, False)):
            return None
        return text, spans


def fast_tokens(tokenizer: Any, render: Render, end_ids: frozenset[int]) -> FastTokens | None:
    """The fast path of a Hugging Face tokenizer and template, or None where their kind is not known to have one."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    pieces, pattern = _pieces(render), _pattern(described)
    added = described["added_tokens"]
    if importlib.util.find_spec("tiktoken") is None or not pieces or not pattern or not _is_plain(described, added):
        return None
    import tiktoken

    special = {token["content"]: token["id"] for token in added}
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    vocabulary = described["model"]["vocab"].items()
    try:
        ranks = {bytes(byte_of[c] for c in word): i for word, i in vocabulary if word not in special}
        encoding = tiktoken.Encoding("base", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    except (KeyError, ValueError):  # a word that is no bytes, an expression tiktoken cannot read
        return None
    lengths = [0] * (1 + max((*ranks.values(), *special.values())))
    for word, number in (*ranks.items(), *((text.encode(), i) for text, i in special.items())):
        lengths[number] = len(word)
    return FastTokens(
        lambda text: encoding.encode_to_numpy(text, allowed_special="all").astype(np.int32),
        np.array(lengths),
        pieces,
        _marks(str(tokenizer.chat_template)),
        render,
        end_ids,
    )


def _marks(template: str) -> re.Pattern[str]:
    """Beginnings of all marks in angle or square brackets that stand in the template."""
    found = {mark[:3] for mark in re.findall(r"[<\[][^\s'\"\\\]>]{2,}", template)}
    return re.compile("|".join(map(re.escape, sorted(found))) or "(?!)")


def _pieces(render: Render) -> dict[tuple[str, str], str]:
    """What the template writes between contents, and before the first and after the last; empty if it does otherwise.

    The generation prompt must be exactly what stands before the assistant's content: there the mask begins.
    """
    pieces: dict[tuple[str, str], str] = {}
    for roles in PROBES:
        contents = [f"qZ{number}" for number in range(len(roles))]
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        try:
            text = render(messages, False)
            prompt = render(messages[: roles.index("assistant")], True)
        except NotTrainable:
            continue  # a template without a system role
        if not text.startswith(prompt + contents[roles.index("assistant")]):
            return {}
        between = []
        for content in contents:
            head, found, text = text.partition(content)
            if not found:
                return {}
            between.append(head)
        for key, piece in zip(pairwise(("", *roles, "")), (*between, text), strict=True):
            if pieces.setdefault(key, piece) != piece:
                return {}
    return pieces


def _pattern(described: dict[str, Any]) -> str | None:
    """The regular expression of a byte-level pre-tokenizer as Qwen, Llama 3 and GPT-4 have it; None for another."""
    parts = (described["pre_tokenizer"] or {}).get("pretokenizers", [])
    match [(part["type"], part) for part in parts]:
        case [("Split", split), ("ByteLevel", bytes_)] if not bytes_["use_regex"] and not bytes_["add_prefix_space"]:
            is_plain = split["behavior"] == "Isolated" and not split["invert"]
            return split["pattern"].get("Regex") if is_plain else None
    return None


def _is_plain(described: dict[str, Any], added: Sequence[dict[str, Any]]) -> bool:
    """Byte-level BPE, NFC or no normalisation, added tokens that take no neighbouring space with them."""
    model, normalizer = described["model"], described["normalizer"]
    return (
        model["type"] == "BPE"
        and not any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and (normalizer is None or normalizer["type"] == "NFC")
        and not any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added)
    )


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
