"""The documents cannot lie: tables are computed again, commands parse, questions have answers, the text stays plain."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from scripts.cli import GROUPS, _parser
from scripts.errors import LorryError
from tests.docs.made import DOCUMENTS, ROOT, with_made_tables

PAGES = sorted((ROOT / "docs").rglob("*.md"))
NAMED = {"analysis": DOCUMENTS[0], "instructions": DOCUMENTS[1], "runbook": ROOT / "docs" / "runbook.md"}
QUESTIONS = yaml.safe_load((Path(__file__).parent / "questions.yaml").read_text(encoding="utf-8"))
COMMANDS = {command.name for group in GROUPS.values() for command in group}


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def shell_lines(text: str) -> list[str]:
    """The commands of the ```sh blocks, without here-documents."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in re.sub(r"<<(\w+)\n.*?^\1$", "", block, flags=re.M | re.S).splitlines()]


def test_the_two_documents_have_the_names_that_were_agreed() -> None:
    agreed = ["analysis", "instructions"]
    assert [p.name for p in DOCUMENTS] == [f"04f-pipeline-build-section-E04.5-runpod-{name}.md" for name in agreed]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.stem[-12:])
def test_every_computed_table_is_what_its_command_gives_today(path: Path) -> None:
    assert with_made_tables(text_of(path)) == text_of(path), "write them anew: python -m tests.docs.made"


def test_the_analysis_has_its_worked_examples() -> None:
    computed = re.findall(r"Computed by `lorry plan [^`]+`[^\n]*:\n\n\|", text_of(DOCUMENTS[0]))
    assert len(computed) >= 6


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.stem[-12:])
def test_the_documents_paste_into_a_word_processor(path: Path) -> None:
    prose = re.sub(r"```.*?```|`[^`]*`", "", text_of(path), flags=re.DOTALL)
    assert not re.search(r"</?[a-z]+[ >/]|<!--", prose), "no HTML"
    assert "[^" not in prose, "no footnotes"
    for line in prose.splitlines():
        if line.startswith("|"):
            assert line.count("|") - line.count("\\|") <= 6, line


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_every_lorry_command_in_the_pages_parses(path: Path) -> None:
    parser = _parser()
    for line in shell_lines(text_of(path)):
        words = shlex.split(line, comments=True)
        if words[:1] == ["lorry"] and words[1:] != ["--help"]:
            try:
                parser.parse_args(words[1:])
            except LorryError as error:
                pytest.fail(f"{path.name}: {line}: {error}")


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_every_command_that_the_prose_names_exists(path: Path) -> None:
    for word in re.findall(r"`lorry ([a-z][a-z-]*)", text_of(path)):
        assert word in COMMANDS, f"{path.name}: lorry {word}"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_every_file_that_the_prose_names_exists(path: Path) -> None:
    rooms = "recipes|scripts|trainer|infra|docs|tests|examples|clients|benchmarks"
    for name in re.findall(rf"`((?:{rooms})/[\w./-]*)`", text_of(path)):
        assert (ROOT / name).exists(), f"{path.name}: {name}"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_every_variable_that_the_prose_names_is_read_somewhere(path: Path) -> None:
    code = "\n".join(text_of(p) for room in ("scripts", "trainer", "examples") for p in (ROOT / room).rglob("*.py"))
    for name in re.findall(r"`(LORRY_[A-Z0-9_]+)`", text_of(path)):
        assert f'"{name}"' in code, f"{path.name}: {name}"


@pytest.mark.parametrize("page", sorted(QUESTIONS))
def test_every_question_of_a_newcomer_has_a_heading_that_answers_it(page: str) -> None:
    text = text_of(NAMED[page])
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    for question, heading in QUESTIONS[page].items():
        assert headings.count(heading) == 1, f"{question} -> {heading}"
        answer = text.partition(f"# {heading}\n")[2].partition("\n#")[0]
        assert len(answer.split()) >= 25, f"{heading}: too short to answer anything"


def test_there_are_thirty_questions_and_more() -> None:
    assert sum(len(questions) for questions in QUESTIONS.values()) >= 30


def test_each_of_the_ten_questions_is_answered_in_its_first_line() -> None:
    text = text_of(DOCUMENTS[0])
    for number in range(1, 11):
        section = re.search(rf"^## {number}\. .+\n\n(.+)$", text, flags=re.MULTILINE)
        assert section, number
        assert section[1].startswith("**Short answer: "), number
