"""What every store promises, on a folder and on S3 alike."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.errors import InputError, NotFound, VerificationFailed
from scripts.store import FileStore, Store, open_store
from scripts.store.base import checked, shown

MIB = 1024 * 1024
Run = Callable[..., CompletedProcess[str]]


def test_what_was_written_is_read(store: Store) -> None:
    assert store.read("job-1/status.json") is None
    store.write("job-1/status.json", b"one")
    store.write("job-1/status.json", b"two")
    assert store.read("job-1/status.json") == b"two"


def test_the_second_create_loses_and_changes_nothing(store: Store) -> None:
    assert store.create("job-1/stop.json", b"first") is True
    assert store.create("job-1/stop.json", b"second") is False
    assert store.read("job-1/stop.json") == b"first"


def test_of_eight_processes_that_create_exactly_one_wins(store: Store, store_url: str, run_python: Run) -> None:
    done = run_python("tests/store/race.py", store_url, "job-1/stop.json", "8")
    winners = done.stdout.split()
    assert len(winners) == 1
    assert store.read("job-1/stop.json") == f"writer {winners[0]}".encode()


def test_keys_lists_a_folder_and_not_its_namesakes(store: Store) -> None:
    for key in ("job-1/data/train.jsonl", "job-1/launch.json", "job-10/launch.json"):
        store.write(key, b"x")
    assert store.keys("job-1") == ["job-1/data/train.jsonl", "job-1/launch.json"]
    assert store.keys("job-1/data") == ["job-1/data/train.jsonl"]
    assert store.keys() == ["job-1/data/train.jsonl", "job-1/launch.json", "job-10/launch.json"]
    assert store.keys("job-2") == []
    assert store.folders() == ["job-1", "job-10"]


def test_an_empty_store_has_no_folders(store: Store) -> None:
    assert store.folders() == []
    assert store.keys() == []


@pytest.mark.parametrize("size", [0, 1, 8 * MIB, 8 * MIB + 1, 30 * MIB])
def test_a_file_of_any_size_goes_in_and_comes_out(store: Store, tmp_path: Path, size: int) -> None:
    source, target = tmp_path / "source", tmp_path / "deep" / "target"
    source.write_bytes(os.urandom(size))
    done: list[int] = []
    store.put_file(source, "job-1/file.bin", progress=done.append)
    assert sum(done) == size
    done.clear()
    store.get_file(
        "job-1/file.bin", target, sha256=hashlib.sha256(source.read_bytes()).hexdigest(), progress=done.append
    )
    assert sum(done) == size
    assert target.read_bytes() == source.read_bytes()
    assert list(target.parent.iterdir()) == [target]


def test_a_fetched_file_has_the_usual_mode(store: Store, tmp_path: Path) -> None:
    store.write("job-1/a.json", b"{}")
    before = os.umask(0o022)
    try:
        store.get_file("job-1/a.json", tmp_path / "a.json")
        store.put_file(tmp_path / "a.json", "job-1/b.json")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o644
    if isinstance(store, FileStore):
        assert stat.S_IMODE((store.root / "job-1/b.json").stat().st_mode) == 0o644


def test_a_file_replaces_an_older_one(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for text in ("one", "two"):
        path.write_text(text)
        store.put_file(path, "job-1/log")
    assert store.read("job-1/log") == b"two"
    assert store.holds("job-1/log", path)
    path.write_text("six")
    assert not store.holds("job-1/log", path)
    assert not store.holds("job-1/other", path)
    assert not store.holds("job-1/log", tmp_path / "missing")


def test_a_wrong_hash_leaves_no_file(store: Store, tmp_path: Path) -> None:
    store.write("job-1/a.json", b"{}")
    with pytest.raises(VerificationFailed, match=r"SHA-256 44136fa355b3\.\.\., not 000000000000\.\.\. as expected"):
        store.get_file("job-1/a.json", tmp_path / "a.json", sha256="0" * 64)
    assert [p for p in tmp_path.iterdir() if p.is_file()] == []


def test_missing_files_are_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"job-1/a\.json: no such file"):
        store.get_file("job-1/a.json", tmp_path / "a.json")
    with pytest.raises(NotFound, match="gone: no such file"):
        store.put_file(tmp_path / "gone", "job-1/a.json")


@pytest.mark.parametrize(
    "key", ["job-1/a b+c%20d.txt", "job-1/ünï/日本.txt", "job-1/what?#now&=.txt", "job-1/it's (1) [x] ~@!$,;.txt"]
)
def test_odd_characters_in_keys_survive(store: Store, tmp_path: Path, key: str) -> None:
    store.write(key, b"odd")
    assert store.read(key) == b"odd"
    assert store.keys("job-1") == [key]
    store.get_file(key, tmp_path / "fetched")
    store.put_file(tmp_path / "fetched", key + "2")
    assert store.keys("job-1") == [key, key + "2"]


def test_what_other_tools_left_is_not_shown(store: Store, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    store.write("job-1/a.json", b"{}")
    if isinstance(store, FileStore):
        (store.root / "job-1" / ".a.json.77.tmp").write_text("half")
        (store.root / ".hidden").mkdir()
    else:
        s3, bucket = request.getfixturevalue("s3"), store.url.split("/")[2]
        for key in ("jobs/job-1/", "jobs/job-1/.part", "jobs//x", "jobs/.uploads/1"):
            s3.put_object(Bucket=bucket, Key=key, Body=b"")
    assert store.keys() == ["job-1/a.json"]
    assert store.folders() == ["job-1"]


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.text(min_size=0, max_size=30),
        st.lists(st.sampled_from(["..", ".", "", "a", "job-1", "\x00", "a\\b", "~", "C:"]), max_size=5).map("/".join),
    )
)
def test_no_accepted_key_leaves_the_store(key: str) -> None:
    if not shown(key):
        with pytest.raises(InputError, match="store key"):
            checked(key)
        return
    with tempfile.TemporaryDirectory() as folder:
        store = FileStore(Path(folder, "root"))
        assert store.create(key, b"x")
        assert store.keys() == [key]
        assert [path.name for path in Path(folder).iterdir()] == ["root"]


@pytest.mark.parametrize(
    ("key", "want"),
    [
        ("", "a relative path"),
        ("/etc/passwd", "a relative path"),
        ("a//b", "a relative path"),
        ("a/../../b", "no part may begin with a dot"),
        ("a/.hidden", "no part may begin with a dot"),
        ("a\nb", "no control characters"),
        ("a\\..\\b", "no control characters and no backslash"),
        ("\ud800", "no control characters"),
        ("a/" + "b" * 256, "at most 900 bytes, 255 in one part"),
        ("/".join(["abcdefghi"] * 91), "at most 900 bytes"),
    ],
)
def test_unsafe_keys_are_refused_by_every_method(store: Store, tmp_path: Path, key: str, want: str) -> None:
    (tmp_path / "file").write_text("x")
    calls: list[Callable[[], Any]] = [
        lambda: store.read(key),
        lambda: store.write(key, b""),
        lambda: store.create(key, b""),
        lambda: store.holds(key, tmp_path / "file"),
        lambda: store.put_file(tmp_path / "file", key),
        lambda: store.get_file(key, tmp_path / "file"),
        *([lambda: store.keys(key)] if key else []),
    ]
    for call in calls:
        with pytest.raises(InputError, match=want):
            call()


def test_a_huge_record_is_refused_not_read(store: Store, tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(64 * MIB + 1)
    store.put_file(tmp_path / "huge", "job-1/status.json")
    with pytest.raises(InputError, match="more than 67108864 bytes"):
        store.read("job-1/status.json")


@pytest.mark.parametrize(
    "url", ["", "jobs", "/jobs", "file://host/jobs", "file:jobs", "s3://", "s3:///jobs", "https://x/y", "s3://b/../x"]
)
def test_a_url_that_is_no_store_is_refused(url: str) -> None:
    with pytest.raises(InputError):
        open_store(url)


def test_a_folder_with_spaces_in_its_url_is_found(tmp_path: Path) -> None:
    open_store((tmp_path / "a b%20ü").as_uri()).write("x/y", b"1")
    assert (tmp_path / "a b%20ü" / "x" / "y").read_bytes() == b"1"


def test_files_move_in_bounded_memory(store_url: str, tmp_path: Path, run_python: Run) -> None:
    """A file of 160 MiB; the client may hold 4 parts of 8 MiB, twice, and some room: 80 MiB."""
    with (tmp_path / "large").open("wb") as file:
        file.truncate(160 * MIB)
    code = (
        "import re, sys; from pathlib import Path; from scripts.store import open_store\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])\n"
        "store, source = open_store(sys.argv[1]), Path(sys.argv[2]); store.read('warm/up'); before = peak()\n"
        "store.put_file(source, 'job-1/large'); store.get_file('job-1/large', source.with_name('back'))\n"
        "moved = peak(); source.read_bytes(); print(moved - before, peak() - before)"
    )
    moved_kib, read_kib = map(int, run_python("-c", code, store_url, str(tmp_path / "large")).stdout.split())
    assert moved_kib < 80 * 1024
    assert read_kib > 150 * 1024, "the measure itself must see a whole file in memory"
    assert (tmp_path / "back").stat().st_size == 160 * MIB
