"""The README cannot lie: its file map is made from the files, its help text from the program, its commands exist.

python tests/test_readme.py        # writes the made parts anew
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
ROOMS = ("recipes", "scripts", "trainer", "benchmarks")
# What is no Python file of a room is named by its folder or by its own path.
PLACES = {
    "infra/": "Terraform for Runpod and AWS, and the images: infra/image/Dockerfile",
    "examples/": "training sets to try, in the forms the web app writes, and the client of `make demo-runpod`",
    "clients/web/": "a typed client for the web app, without dependencies",
    "docs/": "analysis, instructions, runbook, surprises, decisions; docs/README.md is its map",
    ".github/workflows/": "check, terraform, image, train, reap",
    "tests/": "what is claimed, shown: one folder per room",
    ".ci/run": "what continuous integration runs",
    "Makefile": "demo, demo-runpod, live-smoke, test, test-slow, test-long, bench",
    "pyproject.toml": "packages, pins and settings of the tools",
    "requirements.lock": "every version, resolved",
    ".gitignore": "what is made, not kept",
    "README.md": "this page",
}

SAID = {
    "config.json": "the shape of the smoke model",
    "chat_template.jinja": "its chat template",
    "tokenizer.json": "its tokenizer",
    "tokenizer_config.json": "which of its tokens end a turn and fill up",
}


def file_map() -> str:
    """Every file of the rooms with the first sentence of its docstring or comment, then the other places."""
    lines = []
    for room in ROOMS:
        files = [path for path in _tracked() if path.parts[0] == room]
        folders = sorted({path.parent for path in files})
        for folder in folders:
            lines.append(f"{folder.as_posix()}/")
            lines += [f"  {path.name:<26} {_phrase(path)}" for path in files if path.parent == folder and _phrase(path)]
    lines.append("")
    lines += [f"{place:<28} {phrase}" for place, phrase in PLACES.items()]
    return "\n".join(line.rstrip() for line in lines)


def help_text() -> str:
    """What `lorry --help` prints, at 99 columns."""
    done = subprocess.run(
        [sys.executable, "-m", "scripts.cli"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "99"},
    )
    return "$ lorry --help\n" + done.stdout.rstrip()


MADE = {"file map": file_map, "help": help_text}


def test_the_made_parts_are_current() -> None:
    text = README.read_text(encoding="utf-8")
    assert _with_made_parts(text) == text, "write them anew: python tests/test_readme.py"


def test_every_tracked_file_is_on_the_map() -> None:
    mapped = file_map()
    for path in _tracked():
        known = path.as_posix() in PLACES or any(path.as_posix().startswith(p) for p in PLACES if p.endswith("/"))
        assert known or (path.parts[0] in ROOMS and path.name in mapped), path


def test_every_place_on_the_map_exists() -> None:
    for place in PLACES:
        assert (ROOT / place).exists(), place


def test_every_link_leads_somewhere() -> None:
    for page in [README, *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_command_shown_exists() -> None:
    commands = set(re.findall(r"^  ([a-z-]+) +[a-z]", help_text(), flags=re.MULTILINE))
    for word in re.findall(r"^\$? ?lorry ([a-z][a-z-]*)", README.read_text(encoding="utf-8"), flags=re.MULTILINE):
        assert word in commands, word


def _phrase(path: Path) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.suffix == ".py":
        said = ast.get_docstring(ast.parse(text)) or ""
    elif path.suffix in (".yaml", ".yml"):
        said = " ".join(line.lstrip("# ") for line in text.splitlines()[:3] if line.startswith("#"))
    elif path.suffix == ".md":
        said = text.lstrip("# ").splitlines()[0] + "."
    else:
        said = SAID.get(path.name, "")
    first = re.split(r"(?<=[.;])\s", said.replace("\n", " "))[0]
    return first.rstrip(".;:")


def _tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted(Path(line) for line in done.stdout.splitlines() if (ROOT / line).is_file())


def _with_made_parts(text: str) -> str:
    for name, make in MADE.items():
        pattern = re.compile(rf"(<!-- made: {name} -->\n```\n).*?(\n```)", flags=re.DOTALL)
        assert pattern.search(text), f"README.md has no place for: {name}"
        made = make()
        text = pattern.sub(lambda found, made=made: found.group(1) + made + found.group(2), text)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    README.write_text(_with_made_parts(README.read_text(encoding="utf-8")), encoding="utf-8")
