"""Seeded worlds: whatever fails, a job ends with a verified adapter or a reason, one machine at a time, all billed."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.runpod.test_worlds import folder  # noqa: F401
from tests.sagemaker.world import Mortal, World

QUICK, ALL = 10, 310


def ends(seeds: range, below: Path) -> Counter[str]:
    """How the jobs of these seeds ended; fails with every broken promise."""
    broken, seen = [], Counter[str]()
    for seed in seeds:
        (below / str(seed)).mkdir()
        world = World(seed, below / str(seed))
        seen[world.live()] += 1
        broken += [f"world {seed}: {fault}" for fault in dict.fromkeys(world.found)]
        shutil.rmtree(below / str(seed))
    assert not broken, "\n".join(broken)
    return seen


def test_a_few_worlds_end_well_or_with_a_reason(folder: Path) -> None:  # noqa: F811
    assert ends(range(QUICK), folder)["completed"] >= 4


@pytest.mark.parametrize("broken", ["stop", "owned"])
def test_a_stop_or_a_reaper_that_ends_nothing_breaks_a_promise(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
) -> None:
    monkeypatch.setattr(Mortal, broken, lambda *_: [])
    with pytest.raises(AssertionError, match="a training job is left"):
        ends(range(9, 10), folder)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_every_world_ends_well_or_with_a_reason(folder: Path) -> None:  # noqa: F811
    seen = ends(range(QUICK, ALL), folder)
    assert min(seen["completed"], seen["failed"]) >= 40, seen
    assert seen["cancelled"] >= 1, seen
