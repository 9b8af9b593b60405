"""Counts of users' own chats: whatever is lost or comes twice, each chat counts once, and chance moves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.serving import Outcomes
from scripts.errors import InputError
from scripts.serving.outcomes import LEAST_FAILED, WINDOW_SECONDS, WINDOWS, Told, complaint, counted, keep
from scripts.store import open_store

NOW = 1_790_000_200.0
WINDOW = int(NOW // WINDOW_SECONDS)


def _told(reporter: str, window: int, answered: int, failed: int) -> Told:
    return Told(model="good-1", reporter=reporter, window=window, answered=answered, failed=failed)


def test_totals_that_come_twice_or_late_count_once_and_only_of_the_last_hour(tmp_path: Path) -> None:
    store = open_store(tmp_path.as_uri())
    for answered in (1, 5, 9, 9):  # the same process, over and over
        keep(store, "good-1", _told("process-1", WINDOW, answered, 1), NOW)
    keep(store, "good-1", _told("process-2", WINDOW, 2, 0), NOW)
    keep(store, "good-1", _told("process-1", WINDOW - 1, 4, 0), NOW)
    keep(store, "good-2", _told("process-1", WINDOW, 70, 70), NOW)
    assert counted(store, "good-1", 0.0, NOW) == Outcomes(answered=15, failed=1)
    assert counted(store, "good-1", WINDOW * WINDOW_SECONDS, NOW) == Outcomes(answered=11, failed=1)
    assert counted(store, "good-1", NOW, NOW) == Outcomes()  # the window began before it was live
    assert counted(store, "good-1", 0.0, NOW + (WINDOWS - 1) * WINDOW_SECONDS) == Outcomes(answered=11, failed=1)
    assert counted(store, "good-1", 0.0, NOW + WINDOWS * WINDOW_SECONDS) == Outcomes()
    (tmp_path / "_outcomes" / "good-1" / str(WINDOW) / "process-2.json").write_text("half")
    assert counted(store, "good-1", 0.0, NOW) == Outcomes(answered=13, failed=1)


@pytest.mark.parametrize("window", [0, WINDOW - 2, WINDOW + 2])
def test_a_process_with_a_wrong_clock_hears_the_right_window(tmp_path: Path, window: int) -> None:
    with pytest.raises(InputError, match=f"window: {window}; {WINDOW}: Unix time over 300"):
        keep(open_store(tmp_path.as_uri()), "good-1", _told("process-1", window, 1, 0), NOW)
    assert not list(tmp_path.iterdir())


@given(answered=st.integers(0, 10**9), failed=st.integers(0, 10**9))
def test_it_complains_of_five_failures_or_more_that_are_more_than_one_in_twenty(answered: int, failed: int) -> None:
    said = complaint(Outcomes(answered=answered, failed=failed))
    assert (said is not None) == (failed >= LEAST_FAILED and 20 * failed > answered + failed)
    more = complaint(Outcomes(answered=answered, failed=failed + 1))
    assert more is not None or said is None
