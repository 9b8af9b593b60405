"""What kind of file it is, and its rows as bytes: one JSON object per line, one JSON document, or neither.

A JSON Lines file is read a line at a time in bounded memory. One JSON object or array is read whole, up to 64 MiB.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from msgspec import UNSET, Raw

from recipes.errors import InputError, Problem
from scripts.training_set.findings import Findings, Unusable
from scripts.training_set.rows import ConversationObject, DocumentObject, RawRow
from scripts.training_set.syntax import check_depth, syntax_error

MIB = 2**20
MAX_FILE = 2 * 2**30
MAX_LINE = 16 * MIB
MAX_DOCUMENT = 64 * MIB

_BOM = b"\xef\xbb\xbf"
_EXPORT = "export the training set as JSON Lines: one JSON object per line, saved as UTF-8"
_MAGIC = (
    (b"\x1f\x8b", "a gzip file", "unpack it first (gunzip)"),
    (b"PK\x03\x04", "a zip archive or an Excel or Word file", f"unpack it, or {_EXPORT}"),
    (b"%PDF", "a PDF document", _EXPORT),
    (b"\xff\xfe", "UTF-16 text", "save the file as UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "save the file as UTF-8"),
    (b"PAR1", "a Parquet file", _EXPORT),
    (b"SQLite format 3", "an SQLite database", _EXPORT),
    (b"\x28\xb5\x2f\xfd", "a zstd file", "unpack it first (zstd -d)"),
    (b"BZh", "a bzip2 file", "unpack it first (bunzip2)"),
    (b"\xfd7zXZ", "an xz file", "unpack it first (xz -d)"),
    (b"{\\rtf", "a rich text (RTF) document", _EXPORT),
    (b"<", "a web page or XML, perhaps the error page of a link that expired", "download the training set again"),
)


Placed = tuple[Raw, str | None, str]
"A row, the name of the conversation around it, and its label."
Refuse = Callable[[RawRow, Unusable], None]
"(row, what is wrong): records a problem."


@dataclass(frozen=True)
class Container:
    """The rows of a file. `rows` may be called again; `refuse` gets lines that are too long to read."""

    shape: str
    rows: Callable[[Refuse], Iterator[RawRow]]


def open_container(path: Path, file: BinaryIO) -> Container:
    """Recognises the file behind `path`. Raises InputError when it can be no training set."""
    name = path.name
    size = file.seek(0, 2)
    if size > MAX_FILE:
        raise InputError(Problem(name, f"{size / 2**30:.1f} GiB", "at most 2 GiB; split it, or train on a part"))
    file.seek(0)
    head = file.read(64 * 1024)
    _refuse_foreign(name, head)
    start = len(_BOM) if head.startswith(_BOM) else 0
    if _is_lines(file, start):
        return Container("JSON Lines", lambda refuse: _lines(file, start, refuse))
    if size > MAX_DOCUMENT:
        raise InputError(
            Problem(name, f"one JSON document of {size // MIB} MiB", f"at most {MAX_DOCUMENT // MIB} MiB; {_EXPORT}")
        )
    file.seek(start)
    shape, rows = _document(name, file.read(), start)
    return Container(shape, lambda refuse: iter(rows))


def read_row(file: BinaryIO, offset: int, length: int) -> bytes:
    """The bytes of a row seen before."""
    return os.pread(file.fileno(), length, offset)


def _refuse_foreign(name: str, head: bytes) -> None:
    text = head.removeprefix(_BOM).lstrip()
    if not text:
        raise InputError(Problem(name, "an empty file", "at least one example"))
    for magic, got, want in _MAGIC:
        if head.startswith(magic) or (magic == b"<" and text.startswith(magic)):
            raise InputError(Problem(name, got, want))
    if b"\0" in head[:4] and head[:4].strip(b"\0")[:1] in (b"{", b"["):
        raise InputError(Problem(name, "UTF-16 or UTF-32 text", "save the file as UTF-8"))
    first, second = [*text.split(b"\n", 2), b""][:2]
    if text[:1] in (b"{", b"[") or second.lstrip()[:1] == b"{":
        return
    if name.lower().endswith((".csv", ".tsv")) or any(
        0 < first.count(mark) == second.count(mark) for mark in (b",", b";", b"\t")
    ):
        raise InputError(Problem(name, "a table (CSV)", _EXPORT))
    raise InputError(Problem(f"{name}:1:1", "not JSON", _EXPORT))


def _is_lines(file: BinaryIO, start: int) -> bool:
    """Whether the file holds one value per line, going by its first two lines that hold anything.

    A document written over several lines shows itself by a first line that is no whole object. A first line that is
    merely broken is told from it by the second, which is whole or not there.
    """
    file.seek(start)
    stripped = (line.strip() for line in iter(lambda: file.readline(MAX_LINE), b""))
    first, second = [*islice((line for line in stripped if line), 2), b""][:2]
    if _whole(first, dict[str, Raw]):
        return bool(second) or not _holds_pairs(first)
    if first.startswith(b"["):
        return bool(second) and _whole(first, list[Raw])
    return _whole(second, dict[str, Raw]) or not second


def _whole(line: bytes, kind: Any) -> bool:
    try:
        msgspec.json.decode(line, type=kind)
    except (ValueError, RecursionError):
        return False
    return True


def _holds_pairs(line: bytes) -> bool:
    """Whether an object alone in its file is a document of pairs (forms a, d, e) and not a row."""
    keys = msgspec.json.decode(line, type=dict[str, Raw])
    return "training_pairs" in keys or ("conversations" in keys and b'"training_pairs"' in line)


def _lines(file: BinaryIO, start: int, refuse: Refuse) -> Iterator[RawRow]:
    file.seek(start)
    at = start
    for number in count(1):
        data = file.readline(MAX_LINE + 1)
        if not data:
            return
        length = len(data)
        if length > MAX_LINE:
            refuse(RawRow(number, at, b""), Unusable(f"a line longer than {MAX_LINE // MIB} MiB", "shorter lines"))
            while not data.endswith(b"\n") and (data := file.readline(MAX_LINE)):
                length += len(data)
        elif not data.isspace():
            yield RawRow(number, at, data)
        at += length


def _document(name: str, data: bytes, start: int) -> tuple[str, list[RawRow]]:
    """The rows inside one JSON object or array, each with the line it begins on."""
    try:
        data.decode()
        check_depth(data)
        if data.lstrip()[:1] == b"[":
            rows = msgspec.json.decode(data, type=list[Raw])
            return "a JSON array", list(_located(data, start, ((row, None, f"[{n}]") for n, row in enumerate(rows))))
        document = msgspec.json.decode(data, type=DocumentObject)
        return _object_rows(data, start, document)
    except (ValueError, RecursionError) as error:
        findings = Findings(name)
        findings.refuse_line(1, error if isinstance(error, Unusable) else syntax_error(data, error))
        raise findings.as_error() from None


def _object_rows(data: bytes, start: int, document: DocumentObject) -> tuple[str, list[RawRow]]:
    if document.training_pairs is not UNSET:
        holder = document.dataset_metadata or document.conversation_metadata
        name = str(holder.conversation_id) if holder and holder.conversation_id is not None else "conversation"
        rows = ((pair, name, f"training_pairs[{n}]") for n, pair in enumerate(document.training_pairs))
        return "one JSON object", list(_located(data, start, rows))
    if document.conversations is not UNSET and b'"training_pairs"' in data:
        return "one JSON object", list(_located(data, start, _full_export(document.conversations)))
    line = 1 + data[: len(data) - len(data.lstrip())].count(b"\n")
    return "one JSON object", [RawRow(line, start, data)]


def _full_export(conversations: Sequence[Raw]) -> Iterator[Placed]:
    for index, raw in enumerate(conversations):
        conversation = msgspec.json.decode(raw, type=ConversationObject)
        if conversation.training_pairs is UNSET:
            raise Unusable("missing", "the list of this conversation's pairs", f"conversations[{index}].training_pairs")
        holder = conversation.conversation_metadata
        known = holder is not None and holder.conversation_id is not None
        name = str(holder.conversation_id) if known and holder else f"conversation-{index + 1}"
        for n, pair in enumerate(conversation.training_pairs):
            yield pair, name, f"conversations[{index}].training_pairs[{n}]"


def _located(data: bytes, start: int, rows: Iterator[Placed]) -> Iterator[RawRow]:
    """Finds each row's bytes again: they stand in `data` verbatim and in order."""
    at, line = 0, 1
    for raw, conversation, label in rows:
        text = bytes(raw)
        begin = data.index(text, at)
        line += data.count(b"\n", at, begin)
        yield RawRow(line, start + begin, text, conversation, label)
        line += text.count(b"\n")
        at = begin + len(text)
