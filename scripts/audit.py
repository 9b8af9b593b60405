"""Who did what, in a chain that shows every later change: one small object per entry, each with its predecessor's hash.

record(store, "launch", "bicycle-care-1", who="ann", now=time.time()); verify(store)      # raises VerificationFailed

Entry n is created under its number and never written again, so two writers cannot both be n: the loser reads the
winner and becomes n+1. A client's jobs have their chain in the client's notes, whoever acts. _audit/head.json repeats
the newest entry's number and hash, so that a cut end shows as well. Who can write to the store can forge all of it at
once; keep the head that `lorry audit` prints elsewhere, and compare.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

from pydantic import ValidationError

from recipes.job import Record
from scripts.errors import InputError, Problem, ProviderError, VerificationFailed
from scripts.store import Store, open_store

Deed = Literal["launch", "stop", "evaluate", "override", "promote", "roll back", "delete", "export", "buy"]

FOLDER = "_audit"
"No job can have this name."
HEAD = f"{FOLDER}/head.json"
NOTHING = "0" * 64
"What stands before the first entry."
_CLIENT_JOBS = re.compile(r"(.*/clients/[^/]+)/jobs")
_TRIES = 200
_MOST_CHARACTERS = 500


class Entry(Record):
    """_audit/00000001.json and so on."""

    format: Literal[1] = 1
    number: int
    previous: str
    "SHA-256 of the bytes of the entry before; NOTHING for the first."
    at: float
    who: str
    what: Deed
    subject: str
    "The job, or the client, it was done to."
    note: str = ""


class Head(Record):
    """_audit/head.json: the newest entry, as far as its writer knew."""

    number: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.number}:{self.sha256}"


EMPTY = Head(number=0, sha256=NOTHING)


@dataclass(frozen=True)
class Chain:
    """The entries in order, and the head they end in."""

    entries: tuple[Entry, ...]
    head: Head


def chain_store(store: Store) -> Store:
    """Where the chain of a store of jobs lies: in the store itself, but for a client of the front door in its notes."""
    of_a_client = _CLIENT_JOBS.fullmatch(store.url)
    return open_store(f"{of_a_client[1]}/notes") if of_a_client else store


def record(store: Store, what: Deed, subject: str, *, who: str, now: float, note: str = "") -> Head:
    """Appends one entry. Raises ProviderError when the store fails or others write all the time."""
    store = chain_store(store)
    head = _newest(store)
    for _ in range(_TRIES):
        entry = Entry(
            number=head.number + 1,
            previous=head.sha256,
            at=now,
            who=who[:_MOST_CHARACTERS] or "unknown",
            what=what,
            subject=subject[:_MOST_CHARACTERS],
            note=note[:_MOST_CHARACTERS],
        )
        data = entry.model_dump_json(indent=2).encode() + b"\n"
        if store.create(_key(entry.number), data):
            head = Head(number=entry.number, sha256=_sha256(data))
            store.write(HEAD, head.model_dump_json().encode())
            return head
        head = _following(store, head)
    raise ProviderError(Problem(f"{store.url}/{FOLDER}", "other writers are at it all the time", "try again"))


def verify(store: Store, expected: str | None = None) -> Chain:
    """The chain, when it is whole. `expected`: a head NUMBER:SHA256 kept elsewhere, which must be part of it.

    Raises VerificationFailed for the first entry that was changed, removed, swapped or added, InputError for an
    `expected` that is no head.
    """
    store = chain_store(store)
    entries: list[Entry] = []
    hashes = [NOTHING]
    for number, key in enumerate(_entry_keys(store), 1):
        if key != _key(number):
            raise _broken(store, _key(number), "missing: an entry was removed")
        data = store.read(key) or b""
        entries.append(_entry(store, key, data, number, hashes[-1]))
        hashes.append(_sha256(data))
    for said in (_head(store), _parsed(expected) if expected else EMPTY):
        if said.number > len(entries):
            raise _broken(store, _key(said.number), "missing: the end was cut off")
        if said.sha256 != hashes[said.number]:
            raise _broken(store, _key(said.number), "not the entry that was written: it was changed or replaced")
    return Chain(tuple(entries), Head(number=len(entries), sha256=hashes[-1]))


def _newest(store: Store) -> Head:
    """The end of the chain: the recorded head, and what was added since."""
    head = _head(store)
    while True:
        following = _following(store, head)
        if following == head:
            return head
        head = following


def _following(store: Store, head: Head) -> Head:
    data = store.read(_key(head.number + 1))
    return head if data is None else Head(number=head.number + 1, sha256=_sha256(data))


def _head(store: Store) -> Head:
    data = store.read(HEAD)
    try:
        return EMPTY if data is None else Head.model_validate_json(data)
    except ValidationError:
        raise _broken(store, HEAD, "not a head") from None


def _entry_keys(store: Store) -> list[str]:
    return [key for key in store.keys(FOLDER) if key != HEAD]


def _entry(store: Store, key: str, data: bytes, number: int, previous: str) -> Entry:
    try:
        entry = Entry.model_validate_json(data)
    except ValidationError:
        raise _broken(store, key, "not an entry") from None
    if entry.number != number:
        raise _broken(store, key, f"entry {entry.number} in the place of {number}: the order was changed")
    if entry.previous != previous:
        raise _broken(store, _key(number - 1), "not the entry that its successor names: it was changed or replaced")
    return entry


def _parsed(text: str) -> Head:
    number, _, sha256 = text.partition(":")
    if not (number.isdecimal() and len(sha256) == 64):
        raise InputError(Problem("--head", repr(text[:90]), "NUMBER:SHA256 as `lorry audit` prints it"))
    return Head(number=int(number), sha256=sha256)


def _broken(store: Store, key: str, got: str) -> VerificationFailed:
    want = "compare with a copy of the bucket; versions of the object show who wrote it"
    return VerificationFailed(Problem(f"{store.url}/{key}", got, want))


def _key(number: int) -> str:
    return f"{FOLDER}/{number:08d}.json"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
