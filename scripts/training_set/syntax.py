"""What is wrong with JSON that cannot be read: the line, the column and a sentence on how to correct it."""

from __future__ import annotations

import json
import re

import msgspec

from scripts.training_set.findings import Unusable

MAX_DEPTH = 32  # the deepest form, a tool's JSON Schema inside a row, needs about 12

_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"{}[]")
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_TYPE = re.compile(r"Expected `(?P<want>.+?)`, got `(?P<got>.+?)`(?: - at `(?P<path>.+)`)?$")
_MISSING = re.compile(r"Object missing required field `(?P<key>.+?)`(?: - at `(?P<path>.+)`)?$")
_BYTE = re.compile(r"\(byte (\d+)\)")

_WORDS = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "null": "null",
    "object": "an object",
    "array": "a list",
}
_ADVICE = {
    "Invalid \\escape": "a backslash in text is written \\\\; elsewhere remove it",
    "Invalid control character": "write a line break in text as \\n, a tab as \\t; remove other control characters",
    "Unterminated string": 'close the text with a double quote; write a quote in text as \\"',
    "Expecting value": "text stands in double quotes; only numbers, true, false and null stand bare",
    "Expecting property name": "a key stands in double quotes; no comma before a closing brace",
    "Illegal trailing comma": "remove the comma before the closing bracket",
    "Extra data": "one JSON value per line, and nothing after it",
}


def check_depth(data: bytes) -> None:
    """Raises Unusable where brackets are nested more than MAX_DEPTH deep.

    A depth of n takes n opening and n closing brackets, so most rows are cleared by one count of their brackets.
    """
    brackets = data.translate(None, _NOT_BRACKETS)
    if len(brackets) <= 2 * MAX_DEPTH:
        return
    for _ in range(MAX_DEPTH // 2):  # one round removes one level or two
        brackets = brackets.replace(b"{}", b"").replace(b"[]", b"")
        if not brackets:
            return
    if _depth(data) > MAX_DEPTH:
        raise Unusable(f"nested more than {MAX_DEPTH} levels deep", "a flatter row")


def syntax_error(data: bytes, error: Exception) -> Unusable:
    """The sentence for a row that the typed decoder refused; `line` in it counts from the row's first."""
    if isinstance(error, msgspec.ValidationError):
        return _type_error(str(error))
    if isinstance(error, RecursionError):
        return Unusable(f"nested more than {MAX_DEPTH} levels deep", "a flatter row")
    text = data.rstrip()
    try:
        json.loads(text.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as bad:
        line, column = _position(text, bad.start)
        return Unusable("a byte that is not UTF-8", "save the file as UTF-8", line=line, column=column)
    except json.JSONDecodeError as bad:
        return _json_error(bad)
    except RecursionError:
        return Unusable(f"nested more than {MAX_DEPTH} levels deep", "a flatter row")
    except _Constant as bad:
        at = _STRING.sub(lambda found: b" " * len(found[0]), text).find(str(bad).encode())
        line, column = _position(text, max(at, 0))
        return Unusable(f"not valid JSON ({bad})", "write null, or a number", line=line, column=column)
    except ValueError:  # a number of more digits than Python converts
        return Unusable("a number that is too long", "a smaller number")
    found = _BYTE.search(str(error))
    line, column = _position(text, int(found[1]) if found else 0)
    return Unusable("not valid JSON (half of a surrogate pair)", "write the whole character", line=line, column=column)


class _Constant(ValueError):
    """NaN or Infinity: Python's json reads it, the JSON standard does not know it."""


def _refuse_constant(word: str) -> None:
    raise _Constant(word)


def _json_error(bad: json.JSONDecodeError) -> Unusable:
    if bad.pos >= len(bad.doc) or bad.msg.startswith("Unterminated string"):
        column = bad.colno
        if not bad.doc.rstrip().endswith(("}", "]")):
            want = "the whole file; was it cut while it was saved or downloaded?"
            return Unusable(f"not valid JSON (it ends too early: {bad.msg})", want, line=bad.lineno, column=column)
    advice = next((words for start, words in _ADVICE.items() if bad.msg.startswith(start)), "correct it here")
    message = bad.msg.removesuffix(": ").rstrip()
    return Unusable(f"not valid JSON ({message})", advice, line=bad.lineno, column=bad.colno)


def _type_error(message: str) -> Unusable:
    if found := _MISSING.search(message):
        path = (found["path"] or "$").removeprefix("$").removeprefix(".")
        return Unusable(f"no key '{found['key']}'", "it is required", path)
    if found := _TYPE.search(message):
        path = (found["path"] or "$").removeprefix("$").removeprefix(".")
        return Unusable(_words(found["got"]), _words(found["want"]), path)
    return Unusable(message, "a value of the right kind")


def _words(kinds: str) -> str:
    return " or ".join(_WORDS.get(kind, kind) for kind in kinds.split(" | "))


def _position(data: bytes, at: int) -> tuple[int, int]:
    """Line and column, both from 1, of a byte; the column counts characters, as editors do."""
    begin = data.rfind(b"\n", 0, at) + 1
    return 1 + data.count(b"\n", 0, at), 1 + len(data[begin:at].decode(errors="replace"))


def _depth(data: bytes) -> int:
    depth = deepest = 0
    for bracket in _STRING.sub(b"", data).translate(None, _NOT_BRACKETS):
        depth += 1 if bracket in b"{[" else -1
        deepest = max(deepest, depth)
    return deepest
