"""Seeded worlds: whatever fails, the job ends with a verified adapter or a reason, one Pod at a time, all billed."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.fake_runpod.clock import Clock
from scripts.fake_runpod.host import Host
from scripts.fake_runpod.server import LocalRunpod, serve
from tests.runpod.conftest import KEY
from tests.runpod.world import EPOCH, World

QUICK, ALL = 6, 320


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where there is such a place: a world writes some hundred small files durably."""
    shared = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="lorry-worlds-", dir=shared if shared.is_dir() else None))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def runpod(folder: Path) -> Iterator[LocalRunpod]:
    nobody = World.__new__(World)
    with serve(KEY, None, host=Host(folder, nobody), clock=Clock(EPOCH)) as local:
        yield local


def ends(seeds: range, runpod: LocalRunpod, folder: Path, kind: type[World] = World) -> Counter[str]:
    """How the jobs of these seeds ended; fails with every broken promise."""
    broken, seen = [], Counter[str]()
    for seed in seeds:
        (folder / str(seed)).mkdir()
        world = kind(seed, runpod, folder / str(seed))
        seen[world.live()] += 1
        broken += [f"world {seed}: {fault}" for fault in dict.fromkeys(world.found)]
        shutil.rmtree(folder / str(seed))
    assert not broken, "\n".join(broken)
    assert runpod.drift == []
    return seen


def test_a_few_worlds_end_well_or_with_a_reason(runpod: LocalRunpod, folder: Path) -> None:
    assert ends(range(QUICK), runpod, folder)["completed"] >= 3


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_eighty_worlds_end_well_or_with_a_reason(runpod: LocalRunpod, folder: Path) -> None:
    seen = ends(range(QUICK, 80), runpod, folder)
    assert min(seen["completed"], seen["failed"]) >= 10, seen


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_every_world_ends_well_or_with_a_reason(runpod: LocalRunpod, folder: Path) -> None:
    seen = ends(range(QUICK, ALL), runpod, folder)
    assert min(seen["completed"], seen["failed"]) >= 40, seen  # both kinds of end are in the draw
    assert min(seen["cancelled"], seen["refused"]) >= 1, seen
