"""A base model's folder: whole, or one sentence that says what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.models import model_folder, model_problem
from tests.container.replay_trainer import tensors

Spoil = Callable[[Path], object]
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def index(folder: Path, *names: str) -> None:
    weight_map = {f"layer.{at}": name for at, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    folder = tmp_path / "Org--Model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    index(folder, *SHARDS)
    for name in SHARDS:
        (folder / name).write_bytes(tensors(1))
    return folder


def test_a_whole_model_has_no_problem(whole: Path) -> None:
    assert model_folder(whole.parent, "Org/Model") == whole
    assert model_problem(whole) is None


def test_one_file_of_weights_needs_no_index(whole: Path) -> None:
    for path in whole.glob("model*"):
        path.unlink()
    (whole / "model.safetensors").write_bytes(tensors(1))
    assert model_problem(whole) is None


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda f: (f / "model.safetensors.index.json").write_text("[" * 100_000), "not an index of safetensors files"),
        (lambda f: (f / "config.json").unlink(), "it has no config.json"),
        (lambda f: (f / SHARDS[1]).unlink(), f"1 of 2 weight files are not whole, first {SHARDS[1]} (missing)"),
        (lambda f: (f / SHARDS[0]).write_bytes(tensors(1)[:-1]), "bytes instead of"),
        (lambda f: (f / SHARDS[0]).write_bytes(tensors(1) + b"x"), "bytes instead of"),
        (lambda f: (f / SHARDS[0]).write_bytes(b"version https://git-lfs"), "(not a safetensors file)"),
        (lambda f: (f / SHARDS[0]).write_bytes(b""), "(not a safetensors file)"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{"), "not an index of safetensors files"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "no weight_map in it"),
        (lambda f: index(f, "../../secrets.safetensors"), "which is not a .safetensors file of this folder"),
        (lambda f: index(f, "model.bin"), "which is not a .safetensors file of this folder"),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(whole: Path, spoil: Spoil, sentence: str) -> None:
    spoil(whole)
    problem = model_problem(whole)
    assert problem is not None
    assert sentence in problem
    assert problem.startswith(str(whole))


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    assert model_problem(tmp_path / "none") == f"{tmp_path}/none: there is no such folder; stage the base model there"
