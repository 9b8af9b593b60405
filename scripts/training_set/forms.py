"""Which form a training set is written in: recognised by the keys of its rows, then decoded with that form's types."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import Raw

from scripts.training_set.convert import KEEP_CHOSEN, PREFERENCE
from scripts.training_set.findings import Findings, Unusable
from scripts.training_set.rows import (
    AlpacaRow,
    MessagesRow,
    MetaCounts,
    PairRow,
    PromptRow,
    RawRow,
    Row,
    ShareRow,
    TurnsRow,
)
from scripts.training_set.syntax import check_depth, syntax_error

_KNOWN = "training pairs, turns, OpenAI messages, Alpaca, ShareGPT, or prompt and completion"


@dataclass(frozen=True)
class Form:
    """One form: its plain name, the type of its rows, and the keys whose repetition would lose text."""

    name: str
    row: type[Row]
    once: tuple[bytes, ...]
    per_message: bytes = b""
    messages: Callable[[Any], int] = lambda row: 0


_FORMS = {
    "pair": Form("training pairs", PairRow, (b'"target_response"', b'"current_user_input"')),
    "messages": Form("OpenAI messages", MessagesRow, (b'"messages"',), b'"content"', lambda r: len(r.messages)),
    "turns": Form("turns", TurnsRow, (b'"turns"',), b'"content"', lambda r: len(r.turns)),
    "sharegpt": Form("ShareGPT", ShareRow, (b'"conversations"',), b'"value"', lambda r: len(r.conversations)),
    "alpaca": Form("Alpaca", AlpacaRow, (b'"instruction"', b'"output"', b'"input"')),
    "prompt": Form("prompt and completion", PromptRow, (b'"prompt"', b'"completion"')),
}


def recognise(rows: Iterable[RawRow], name: str) -> Form:
    """The form of the first row that has one. Raises InputError when no row has."""
    findings = Findings(name)
    for count, raw in enumerate(rows):
        try:
            keys = _keys(raw.data)
            if not _is_header(keys):
                return _FORMS[_form_of(keys)]
        except (ValueError, RecursionError) as error:
            findings.refuse(raw, error if isinstance(error, Unusable) else syntax_error(raw.data, error))
        if count == 100:  # the form shows itself in the first rows, or there is none
            break
    if not findings.problem_count:
        findings.refuse_line(1, Unusable("no examples", "at least one example"))
    raise findings.as_error()


def decoded(rows: Iterable[RawRow], form: Form, findings: Findings, header: list[int]) -> Iterator[tuple[RawRow, Any]]:
    """Every row with its typed value: the schema check. Problems go to `findings`, `_meta` rows are dropped.

    `header` receives the number of pairs that a `_meta` row announces.
    """
    decode = msgspec.json.Decoder(form.row).decode
    for raw in rows:
        data = raw.data
        try:
            row = decode(data)
            if not data.isascii():
                data.decode()  # the decoder does not look into the text that it skips
        except (ValueError, RecursionError) as error:
            _refuse(raw, error, form, findings, header)
        else:
            yield raw, row


def check_keys(data: bytes, row: Any, form: Form) -> None:
    """What the types cannot say. Raises Unusable where a row is nested too deeply, or holds a key twice in one object:
    readers would silently keep one of the two texts.

    Counting the quoted key clears nearly every row; only where it stands too often is the row parsed once more.
    """
    check_depth(data)
    suspect = any(data.count(key) > 1 for key in form.once)
    if not suspect and not (form.per_message and data.count(form.per_message) > form.messages(row)):
        return
    watched = {key.decode().strip('"') for key in (*form.once, form.per_message)}

    def unique(pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen and key in watched:
                raise Unusable(f"the key '{key}' twice in one object", "keep one of them")
            seen.add(key)

    json.loads(data, object_pairs_hook=unique)


def _refuse(raw: RawRow, error: Exception, form: Form, findings: Findings, header: list[int]) -> None:
    if isinstance(error, Unusable):
        findings.refuse(raw, error)
        return
    try:
        keys = _keys(raw.data)
        if _is_header(keys):
            header.extend(_announced(keys["_meta"]))
            return
        other = _FORMS[_form_of(keys)]
    except Unusable as unusable:
        findings.refuse(raw, unusable)
        return
    except (ValueError, RecursionError):
        findings.refuse(raw, syntax_error(raw.data, error))
        return
    if other is not form:
        got = f"a row of the form '{other.name}' in a file of '{form.name}'"
        findings.refuse(raw, Unusable(got, "one form per file: put the two in separate files"))
    else:
        findings.refuse(raw, syntax_error(raw.data, error))


def _keys(data: bytes) -> dict[str, Raw]:
    try:
        return msgspec.json.decode(data, type=dict[str, Raw])
    except msgspec.ValidationError as error:
        raise Unusable("not an object", "one JSON object per row: {...}") from error


def _announced(meta: Raw) -> list[int]:
    """The number of pairs that a header announces; nothing is refused because of a header."""
    try:
        total = msgspec.json.decode(meta, type=MetaCounts).total_pairs
    except (ValueError, RecursionError):
        return []
    return [] if total is None else [total]


def _is_header(keys: Mapping[str, Raw]) -> bool:
    return "_meta" in keys and len(keys) == 1


def _form_of(keys: Mapping[str, Raw]) -> str:
    """The name of the form in _FORMS. Raises Unusable for preference data and for keys that fit no form."""
    if "chosen" in keys or "rejected" in keys or {"completion", "label"} <= keys.keys():
        raise Unusable(PREFERENCE, KEEP_CHOSEN)
    for name, needed in (
        ("pair", {"target_response"}),
        ("pair", {"current_user_input"}),
        ("messages", {"messages"}),
        ("turns", {"turns"}),
        ("sharegpt", {"conversations"}),
        ("alpaca", {"instruction"}),
        ("prompt", {"prompt", "completion"}),
    ):
        if needed <= keys.keys():
            return name
    shown = ", ".join(list(keys)[:8]) or "none"
    raise Unusable(f"an object of no known form (keys: {shown})", _KNOWN)
