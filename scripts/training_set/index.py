"""The on-disk index of one preparation: rows by conversation, examples by content. Memory stays flat at any size."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from scripts.training_set.tokens import Count

_SCHEMA = """
CREATE TABLE conversations (id INTEGER PRIMARY KEY, name TEXT UNIQUE, key TEXT, root INTEGER, valid INTEGER DEFAULT 0);
CREATE TABLE rows (conversation INTEGER, turn INTEGER, line INTEGER, offset INTEGER, length INTEGER,
                   PRIMARY KEY (conversation, turn, offset)) WITHOUT ROWID;
CREATE TABLE examples (id INTEGER PRIMARY KEY, content BLOB UNIQUE, conversation INTEGER, name TEXT, length INTEGER,
                       tokens INTEGER, trained INTEGER);
CREATE TABLE beginnings (content BLOB, conversation INTEGER, PRIMARY KEY (content, conversation)) WITHOUT ROWID;
"""


class Totals(NamedTuple):
    """Sums over one side of the split."""

    examples: int
    conversations: int
    tokens: int
    trained: int


class Index:
    """SQLite in `folder`; nothing in it survives the preparation, so it is neither journalled nor flushed."""

    def __init__(self, folder: Path) -> None:
        self._db = sqlite3.connect(folder / "index.sqlite", isolation_level=None)
        self._db.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-4000;" + _SCHEMA)
        self._db.execute("BEGIN")

    def close(self) -> None:
        """Lets go of the file; the folder is the caller's to remove."""
        self._db.close()

    def add_row(self, conversation: str, key: str | None, turn: int, line: int, offset: int, length: int) -> None:
        """Remembers where a row stands.

        `key` decides the side of the split; None for a conversation without a name of its own, which goes by content.
        """
        self._db.execute("INSERT OR IGNORE INTO conversations (name, key) VALUES (?, ?)", (conversation, key))
        self._db.execute(
            "INSERT INTO rows SELECT id, ?, ?, ?, ? FROM conversations WHERE name = ?",
            (turn, line, offset, length, conversation),
        )

    def conversations(self) -> Iterator[tuple[int, str]]:
        """(id, name) in the order of first appearance."""
        yield from self._db.execute("SELECT id, name FROM conversations ORDER BY id")

    def rows(self, conversation: int) -> Iterator[tuple[int, int, int]]:
        """(line, offset, length) of a conversation's rows, in the order of their turns."""
        yield from self._db.execute(
            "SELECT line, offset, length FROM rows WHERE conversation = ? ORDER BY turn, offset", (conversation,)
        )

    def add_example(self, conversation: int, name: str, beginnings: Sequence[bytes], length: int, count: Count) -> bool:
        """Remembers an example of `length` bytes; False when one of the same content was there before.

        `beginnings` are the hashes of the example up to each of its answers; the last one is of the whole.
        """
        self._db.executemany(
            "INSERT OR IGNORE INTO beginnings VALUES (?, ?)", ((content, conversation) for content in beginnings)
        )
        self._db.execute(
            "UPDATE conversations SET key = ? WHERE id = ? AND key IS NULL", (beginnings[-1].hex(), conversation)
        )
        added = self._db.execute(
            "INSERT OR IGNORE INTO examples (content, conversation, name, length, tokens, trained) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (beginnings[-1], conversation, name, length, count.tokens, count.trained),
        )
        return added.rowcount == 1

    def link(self) -> None:
        """Gives conversations that contain one another the same root: the one whose key sorts first."""
        self._db.execute("UPDATE conversations SET root = id")
        links = self._db.execute(
            "SELECT e.conversation, b.conversation FROM examples e JOIN beginnings b ON b.content = e.content "
            "WHERE e.conversation != b.conversation"
        )
        for one, other in links:
            roots = sorted((self._root(one), self._root(other)), key=lambda root: root[1])
            self._db.execute("UPDATE conversations SET root = ? WHERE id = ?", (roots[0][0], roots[1][0]))
        for conversation, root in self._db.execute("SELECT id, root FROM conversations WHERE root != id").fetchall():
            self._db.execute("UPDATE conversations SET root = ? WHERE id = ?", (self._root(root)[0], conversation))

    def groups(self, seed: int) -> Iterator[tuple[int, int]]:
        """(root, conversations in it) of every group that must stay together, shuffled by `seed`.

        The order depends on the seed and the keys alone, never on the order of the file.
        """

        def shuffled(key: str) -> bytes:
            return hashlib.sha256(f"{seed}:{key}".encode()).digest()

        self._db.create_function("shuffle_key", 1, shuffled, deterministic=True)
        yield from self._db.execute(
            "SELECT c.root, COUNT(*) FROM conversations c JOIN conversations r ON r.id = c.root "
            "WHERE c.id IN (SELECT conversation FROM beginnings) GROUP BY c.root "
            "ORDER BY shuffle_key(r.key)"
        )

    def count_conversations(self) -> int:
        """How many conversations have an example, be it one that stood there before."""
        return int(self._db.execute("SELECT COUNT(DISTINCT conversation) FROM beginnings").fetchone()[0])

    def hold_out(self, roots: Iterable[int]) -> None:
        """Puts the groups of these roots on the validation side."""
        self._db.executemany("UPDATE conversations SET valid = 1 WHERE root = ?", ((root,) for root in roots))

    def lengths(self) -> Iterator[tuple[int, bool]]:
        """(length in bytes, is held out) of every example, in the order they were added."""
        for length, valid in self._db.execute(
            "SELECT e.length, c.valid FROM examples e JOIN conversations c ON c.id = e.conversation ORDER BY e.id"
        ):
            yield length, bool(valid)

    def totals(self, held_out: bool) -> Totals:
        """Sums over the train side or the validation side."""
        row = self._db.execute(
            "SELECT COUNT(*), COUNT(DISTINCT e.conversation), COALESCE(SUM(tokens), 0), COALESCE(SUM(trained), 0) "
            "FROM examples e JOIN conversations c ON c.id = e.conversation WHERE c.valid = ?",
            (int(held_out),),
        ).fetchone()
        return Totals(*row)

    def longest(self) -> tuple[int, str]:
        """Tokens and id of the longest example."""
        row = self._db.execute("SELECT tokens, name FROM examples ORDER BY tokens DESC, id LIMIT 1").fetchone()
        return (row[0], row[1])

    def _root(self, conversation: int) -> tuple[int, str]:
        while True:
            root, key = self._db.execute("SELECT root, key FROM conversations WHERE id = ?", (conversation,)).fetchone()
            if root == conversation:
                return root, key
            conversation = root
