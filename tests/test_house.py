"""The house rules that a machine can check: style, types, sizes, and who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(p for room in ("recipes", "scripts", "trainer") for p in (ROOT / room).rglob("*.py"))


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=280)


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "ruff", "check", "."),
        ("-m", "ruff", "format", "--check", "."),
        ("-m", "mypy"),
    ],
    ids=lambda command: " ".join(command[1:]),
)
def test_linters_find_nothing(command: tuple[str, ...]) -> None:
    done = _run(*command)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small_enough_to_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 320


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_stay_small_enough_to_read(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 45, f"{path.name}:{node.lineno} {node.name} has {lines} lines"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_only_what_they_may(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    banned = {
        "recipes": {"scripts", "trainer", "torch", "transformers", "boto3", "httpx", "requests", "msgspec"},
        "scripts": {"trainer", "torch", "transformers", "peft", "deepspeed"},
        "trainer": {"scripts", "boto3", "httpx", "requests", "urllib", "http", "socket"},
    }[room]
    for node in ast.walk(ast.parse(path.read_text())):
        names = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        for name in names:
            assert name.partition(".")[0] not in banned, f"{path.relative_to(ROOT)}:{node.lineno} imports {name}"


@pytest.mark.parametrize("module", ["scripts.cli", "recipes.load", "recipes.job"])
def test_the_command_line_loads_no_torch_and_no_cloud_sdk(module: str) -> None:
    heavy = ["torch", "transformers", "peft", "deepspeed", "boto3", "botocore", "runpod", "sagemaker", "tokenizers"]
    code = f"import sys, {module}; print(' '.join(m for m in {heavy!r} if m in sys.modules))"
    done = _run("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_the_vocabulary_needs_only_pydantic_and_yaml() -> None:
    code = (
        "import sys; before = set(sys.modules)\n"
        "import recipes.load, recipes.job, recipes.chat, recipes.schedule\n"
        "tops = {m.partition('.')[0] for m in set(sys.modules) - before}\n"
        "print(' '.join(sorted(tops - sys.stdlib_module_names)))"
    )
    done = _run("-c", code)
    allowed = {"recipes", "pydantic", "pydantic_core", "yaml", "_yaml", "annotated_types", "typing_extensions"}
    allowed |= {"typing_inspection", "cython_runtime"}
    assert {name for name in done.stdout.split() if not name.startswith(("_cython", "_sysconfig"))} <= allowed


def test_no_tracked_file_holds_a_path_of_this_machine() -> None:
    places = [str(ROOT), f"{Path.home()}/"] if len(Path.home().parts) > 1 else [str(ROOT)]
    for path in _tracked():
        text = path.read_text(errors="ignore")
        for place in places:
            assert place not in text, f"{path}: {place}"


def test_runpod_is_spelled_runpod() -> None:
    for path in _tracked():
        if path.suffix == ".md":
            assert "Run" + "Pod" not in path.read_text(), path


def _tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / line for line in listed.splitlines() if (ROOT / line).is_file()]
