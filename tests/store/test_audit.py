"""The audit: one chain whoever writes, and every later change to it shows."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from scripts.audit import FOLDER, HEAD, record, verify
from scripts.errors import InputError, VerificationFailed
from scripts.store import FileStore, Store, open_store


def _fill(store: Store, count: int = 5) -> list[str]:
    return [str(record(store, "launch", f"job-{n}", who="ann", now=float(n), note="x" * n)) for n in range(count)]


def test_entries_come_back_in_order_with_their_head(store: Store) -> None:
    heads = _fill(store)
    chain = verify(store)
    assert [entry.subject for entry in chain.entries] == [f"job-{n}" for n in range(5)]
    assert str(chain.head) == heads[-1]
    assert [str(verify(store, head).head) for head in heads] == [heads[-1]] * 5


def test_an_empty_record_is_whole(store: Store) -> None:
    assert verify(store).entries == ()


def _edit(root: Any, number: int, **fields: Any) -> None:
    path = root / FOLDER / f"{number:08d}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields, indent=2) + "\n")


def _renumber(root: Any, number: int, said: int) -> None:
    path = root / FOLDER / f"{number:08d}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"number": said}))


def _remove(root: Any, number: int) -> None:
    (root / FOLDER / f"{number:08d}.json").unlink()


def _swap(root: Any, one: int, other: int) -> None:
    a, b = (root / FOLDER / f"{n:08d}.json" for n in (one, other))
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def _close_the_gap(root: Any, number: int) -> None:
    """Removes an entry and renames the later ones, so that no number is missing."""
    for n in range(number, 5):
        later = root / FOLDER / f"{n + 1:08d}.json"
        value = json.loads(later.read_text()) | {"number": n}
        (root / FOLDER / f"{n:08d}.json").write_text(json.dumps(value))
    _remove(root, 5)


@pytest.mark.parametrize(
    "change",
    [
        *[lambda root, n=n: _edit(root, n, who="bob") for n in range(1, 6)],
        *[lambda root, n=n: _edit(root, n, note="") for n in (2, 5)],
        *[lambda root, n=n: _remove(root, n) for n in range(1, 6)],
        *[lambda root, n=n: _swap(root, n, n + 1) for n in range(1, 5)],
        *[lambda root, n=n: _close_the_gap(root, n) for n in range(1, 5)],
        lambda root: _renumber(root, 3, 4),
        lambda root: (root / FOLDER / "00000003.json").write_text("{}"),
        lambda root: (root / FOLDER / "00000002b.json").write_text("{}"),
        lambda root: (root / HEAD).write_text("{}"),
    ],
)
def test_any_edit_removal_or_reorder_breaks_the_chain(change: Callable[[Any], Any], tmp_path: Any) -> None:
    store = open_store(tmp_path.as_uri())
    assert isinstance(store, FileStore)
    _fill(store)
    verify(store)
    change(tmp_path)
    with pytest.raises(VerificationFailed):
        verify(store)


def test_a_record_cut_together_with_its_head_shows_against_a_head_kept_elsewhere(tmp_path: Any) -> None:
    """Who may write everything may rewrite everything: that is what the printed head is for."""
    store = open_store(tmp_path.as_uri())
    heads = _fill(store)
    _remove(tmp_path, 5)
    number, sha256 = heads[3].split(":")
    (tmp_path / HEAD).write_text(json.dumps({"number": int(number), "sha256": sha256}))
    assert len(verify(store).entries) == 4
    with pytest.raises(VerificationFailed, match="the end was cut off"):
        verify(store, heads[4])
    with pytest.raises(InputError, match="NUMBER:SHA256"):
        verify(store, "5")


def test_writers_at_the_same_time_make_one_chain(store_url: str) -> None:
    def write(name: str) -> None:
        own = open_store(store_url)
        for n in range(6):
            record(own, "launch", f"{name}-{n}", who=name, now=0.0)

    threads = [threading.Thread(target=write, args=(name,)) for name in ("ann", "bob", "eve")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    chain = verify(open_store(store_url))
    assert sorted(entry.subject for entry in chain.entries) == sorted(
        f"{w}-{n}" for w in ("ann", "bob", "eve") for n in range(6)
    )
    for who in ("ann", "bob", "eve"):
        assert [e.subject for e in chain.entries if e.who == who] == [f"{who}-{n}" for n in range(6)]


def test_a_writer_that_dies_before_the_head_loses_no_entry(store: Store) -> None:
    _fill(store, 2)
    behind = store.read(HEAD)
    _fill(store, 2)
    assert behind is not None
    store.write(HEAD, behind)
    record(store, "stop", "job-9", who="ann", now=9.0)
    assert [entry.number for entry in verify(store).entries] == [1, 2, 3, 4, 5]


def test_the_jobs_of_a_client_have_their_chain_in_its_notes_whoever_acts(store_url: str) -> None:
    jobs, notes = (open_store(f"{store_url}/clients/acme/{kind}") for kind in ("jobs", "notes"))
    record(notes, "launch", "job-1", who="client acme", now=1.0)
    record(jobs, "stop", "job-1", who="ann", now=2.0)
    assert [entry.who for entry in verify(notes).entries] == ["client acme", "ann"]
    assert verify(jobs) == verify(notes)
    assert jobs.keys() == []
