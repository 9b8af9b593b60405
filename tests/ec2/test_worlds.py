"""Seeded worlds on EC2: whatever fails, a verified adapter or a reason, one machine at a time, settled to the cent."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ec2.world import Ec2World, MortalEc2

QUICK, ALL = 5, 310


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where there is such a place."""
    shared = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="lorry-worlds-", dir=shared if shared.is_dir() else None))
    yield path
    shutil.rmtree(path)


def ends(seeds: range, folder: Path) -> Counter[str]:
    """How the jobs of these seeds ended; fails with every broken promise."""
    broken, seen = [], Counter[str]()
    for seed in seeds:
        place = folder / str(seed)
        place.mkdir()
        world = Ec2World(seed, None, place)  # type: ignore[arg-type]
        seen[world.live()] += 1
        broken += [f"world {seed}: {fault}" for fault in dict.fromkeys(world.found)]
        shutil.rmtree(place)
    assert not broken, "\n".join(broken)
    return seen


def test_a_few_worlds_on_ec2_end_well_or_with_a_reason(folder: Path) -> None:
    assert ends(range(QUICK), folder)["completed"] >= 1


@pytest.mark.parametrize(("seed", "broken"), [(0, "stop"), (14, "owned")])
def test_a_stop_or_a_reaper_that_ends_nothing_breaks_a_promise(
    folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int, broken: str
) -> None:
    monkeypatch.setattr(MortalEc2, broken, lambda *_: [])
    with pytest.raises(AssertionError, match=r"a machine lives on although its job was stopped|a machine is left"):
        ends(range(seed, seed + 1), folder)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_every_world_on_ec2_ends_well_or_with_a_reason(folder: Path) -> None:
    seen = ends(range(QUICK, ALL), folder)
    assert min(seen["completed"], seen["failed"]) >= 25, seen
    assert seen["cancelled"] >= 1, seen
