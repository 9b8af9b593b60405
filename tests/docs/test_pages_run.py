"""The README's tour and the runbook, done command by command in one terminal, on this machine and stand-ins.

One job is trained; it is watched, shown, judged, exported and taken away as the pages say. Terraform's commands of the
README are those of Section 1, which test_section_one.py walks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.adapter import verify_adapter
from scripts.fake_runpod.server import serve
from tests.docs.made import DOCUMENTS, ROOT
from tests.docs.window import Window, copy_of_the_repository, put_programs
from tests.infra.conftest import (  # noqa: F401  (fixtures)
    RUNPOD_KEY,
    STATE_BUCKET,
    aws_fake,
    aws_server,
    base_env,
    client,
    short_tmp,
)

FENCE = re.compile(r"^```(?:sh)?\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
ELSEWHERE = {
    "terraform": "Section 1 has the same commands, and its test runs them",
    "lorry stage": "tests/setup/test_stage.py, against a local hub",
    "lorry env": "Section 1: it reads what Terraform made there",
    "lorry doctor": "Section 1: it looks at what Terraform made there",
    "lorry serve": "tests/serving: it asks a server that answers",
}
WORDS = {
    "RECIPE": "smoke/zero3",
    "SET": "examples/bicycle-care.jsonl",
    "NAME": "acme",
    "FOLDER": "exported",
    "s3://bucket/jobs": f"s3://{STATE_BUCKET}/jobs",
}


def blocks(path: Path) -> Iterator[tuple[str, str]]:
    """(heading, commands) of the blocks of a page that are for a terminal."""
    heading = path.name
    for part in re.split(r"^(#+ .+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
        if part.startswith("#"):
            heading = part.strip("# ")
        for block in FENCE.findall(part):
            lines = block.splitlines()
            if all(line.split()[0] in ("lorry", "make", "terraform") for line in lines):
                yield heading, block


def here(block: str, job: str) -> str:
    """The commands of a block that this window runs, with its own names."""
    lines = [line for line in block.splitlines() if not line.startswith(tuple(ELSEWHERE))]
    text = "\n".join(lines)
    for word, own in {**WORDS, "JOB": job}.items():
        text = re.sub(rf"(?<![\w-]){re.escape(word)}(?![\w-])", own, text)
    return text


@pytest.fixture
def window(
    tmp_path: Path,
    base_env: dict[str, str],  # noqa: F811
    aws_fake: str,  # noqa: F811
) -> Iterator[Window]:
    copy = copy_of_the_repository(tmp_path / "lorry")
    with serve(RUNPOD_KEY) as runpod:
        environment = {
            **base_env,
            "PATH": f"{put_programs(tmp_path / 'bin')}:{os.environ['PATH']}",
            "PYTHONPATH": str(copy),
            "RUNPOD_API_BASE_URL": runpod.url,
            "RUNPOD_API_KEY": RUNPOD_KEY,
            "RUNPOD_SECRET_lorry_store_key_id": "testing",
            "RUNPOD_SECRET_lorry_store_key_secret": "testing",
            "LORRY_TOKEN_SECRET": "0123456789abcdef" * 4,
            "AWS_ENDPOINT_URL": aws_fake,
        }
        yield Window(copy, environment)


def test_what_is_run_elsewhere_is_run_there() -> None:
    section = DOCUMENTS[1].read_text(encoding="utf-8")
    for _, block in blocks(ROOT / "README.md"):
        for line in block.splitlines():
            if line.startswith(("terraform", "lorry stage", "lorry env", "lorry doctor")):
                words = [word for word in line.split()[:3] if not word.startswith(("Qwen", "infra"))]
                assert " ".join(words) in section, line


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_readme_and_the_runbook_are_done_command_by_command(window: Window) -> None:
    job = ""
    for heading, block in blocks(ROOT / "README.md"):
        said = window.run(here(block, job), f"README.md, {heading}")
        if "lorry run " in block:
            job = json.loads(window.run("lorry jobs --json", "lorry jobs"))[0]["job"]
            assert verify_adapter(window.folder / "jobs" / job / "adapter")
        if "lorry pull " in block:
            assert verify_adapter(window.folder / "adapter"), said
    shutil.copytree(window.folder / "jobs" / job, window.folder / "jobs" / "clients" / "acme" / "jobs" / job)
    said_at = {}
    for heading, block in blocks(ROOT / "docs" / "runbook.md"):
        # What is started anew is what is stopped; the rest is asked of the job that came home.
        new = heading in ("Start a job", "Stop a job")
        said_at[heading] = window.run(here(block, "second" if new else job), f"runbook.md, {heading}")
    assert "cancel" in window.run("lorry show second", "lorry show")
    assert not list((window.folder / "jobs" / "clients" / "acme").rglob("*.safetensors")), said_at
    assert list((window.folder / "exported").glob("*.safetensors"))
