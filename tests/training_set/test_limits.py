"""All problems at once, limits of size, and memory that does not grow with the file."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from recipes.errors import InputError, LorryError
from recipes.recipe import Data
from scripts.training_set import container, prepare

GOOD = b'{"messages": [{"role": "user", "content": "Rust?"}, {"role": "assistant", "content": "Oil it."}]}'


def test_every_problem_of_a_file_is_shown_at_once_in_the_order_of_lines(run, make_pairs) -> None:
    rows = [json.dumps(row).encode() for row in make_pairs("c1", *["text"] * 12)]
    rows[1] = rows[1][:-9]
    rows[3] = rows[3].replace(b'"target_response": "text"', b'"target_response": 7')
    rows[4] = rows[4].replace(b'"assistant"', b'"helper"')
    with pytest.raises(InputError) as caught:
        run(b"\n".join(rows))
    assert [p.where.partition(":")[2].partition(":")[0] for p in caught.value.problems] == ["2", "4", "5"]


def test_twenty_problems_are_shown_and_the_rest_is_counted(run) -> None:
    with pytest.raises(InputError) as caught:
        run(b"\n".join([GOOD, *[b'{"messages": 1}'] * 33]))
    assert len(caught.value.problems) == 21
    assert str(caught.value.problems[-1]) == "set.jsonl: 13 more problems; correct these first"


def test_line_and_column_point_at_the_character(run) -> None:
    with pytest.raises(InputError) as caught:
        run(GOOD + b'\n{"messages": [], "note": "gr\xc3\xb6\xc3\x9fer", "score": 3\\}')
    (problem,) = caught.value.problems
    text = '{"messages": [], "note": "gr\u00f6\u00dfer", "score": 3\\}'
    assert problem.where == f"set.jsonl:2:{text.index(chr(92)) + 1}"


def test_a_document_points_at_line_and_column(run) -> None:
    with pytest.raises(InputError) as caught:
        run(b'{\n  "training_pairs": [\n    {"turn_number": 2\\}\n  ]\n}', "set.json")
    assert caught.value.problems[0].where == "set.json:3:22"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    source = tmp_path / "set.jsonl"
    source.write_bytes(GOOD)
    with pytest.raises(LorryError, match=r"set\.jsonl/out: cannot be written") as caught:
        prepare(source, source / "out", Data(), 1)
    assert caught.value.exit_code == 1


def test_nothing_is_written_when_the_set_is_refused(tmp_path: Path) -> None:
    source, out = tmp_path / "set.jsonl", tmp_path / "out"
    source.write_bytes(GOOD + b"\n{")
    with pytest.raises(InputError):
        prepare(source, out, Data(), 1)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_a_path_that_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="no such file; the path of a training set"):
        prepare(tmp_path / name, tmp_path / "out", Data(), 1)


def test_a_document_over_64_mib_is_told_to_become_json_lines(tmp_path: Path) -> None:
    source = tmp_path / "set.json"
    with source.open("wb") as file:
        file.write(b'{\n"training_pairs": [\n')
        file.truncate(container.MAX_DOCUMENT + 1)
    with pytest.raises(InputError, match=r"one JSON document of 64 MiB; at most 64 MiB; export .* JSON Lines"):
        prepare(source, tmp_path / "out", Data(), 1)


def test_a_file_over_2_gib_is_refused_before_it_is_read(tmp_path: Path) -> None:
    source = tmp_path / "set.jsonl"
    with source.open("wb") as file:
        file.write(GOOD)
        file.truncate(container.MAX_FILE + 1)  # a hole: it takes no room
    with pytest.raises(InputError, match=r"2\.0 GiB; at most 2 GiB"):
        prepare(source, tmp_path / "out", Data(), 1)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Pairs of 5 KiB in conversations of four: 60 MB must take hardly more than 6 MB does, duplicates included."""
    peaks = []
    for megabytes in (6, 60):
        source = tmp_path / f"{megabytes}.jsonl"
        _write_pairs(source, megabytes * 10**6)
        code = f"""
            from pathlib import Path
            from recipes.recipe import Data
            from scripts.training_set import prepare
            report = prepare(Path({str(source)!r}), Path({str(tmp_path / "out")!r}), Data(), 1)
            assert report.merged == report.conversations > 100, report
            # Not ru_maxrss: Linux hands a child the peak of the process that started it, here pytest's.
            status = Path("/proc/self/status").read_text()
            print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parent.parent.parent,
        )
        assert done.returncode == 0, done.stderr
        peaks.append(float(done.stdout))
    assert peaks[1] < peaks[0] + 16, peaks
    assert peaks[1] < 120, peaks


def _write_pairs(path: Path, size: int) -> None:
    text = "Wipe the chain, then oil each link and turn the pedals back. " * 14
    with path.open("w") as file:
        conversation = 0
        while file.tell() < size:
            conversation += 1
            history: list[dict[str, str]] = []
            for turn in (2, 4, 6, 8):
                question, answer = f"Question {turn} of {conversation}?", f"{text}{turn}"
                history = [*history, {"role": "user", "content": question}]
                row = {
                    "conversation_id": f"c{conversation}",
                    "turn_number": turn,
                    "conversation_history": history,
                    "current_user_input": question,
                    "target_response": answer,
                }
                file.write(json.dumps(row) + "\n")
                history = [*history, {"role": "assistant", "content": answer}]
