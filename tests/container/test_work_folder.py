"""What a machine carries home of a job that it worked on in a folder of its own."""

from __future__ import annotations

from pathlib import Path

from scripts.container.work_folder import RemoteFolder
from scripts.store import open_store


def test_what_the_machine_measured_comes_home_so_that_nobody_needs_the_set_again(tmp_path: Path) -> None:
    store, work = open_store((tmp_path / "jobs").as_uri()), tmp_path / "work"
    work.mkdir()
    (work / "scores.json").write_text("{}")
    (work / "notes.txt").write_text("the trainer knows nothing of this")
    RemoteFolder(store, "job-1", work, 1.0).deliver()
    assert store.keys("job-1") == ["job-1/scores.json"]
