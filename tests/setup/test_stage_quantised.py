"""`lorry stage --quantize`: converted where torch is, then staged, verified and repaired like any other model."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from recipes.load import load_recipe
from scripts.model_manifest import ModelManifest, verify_model
from scripts.models import making_commands, model_folder, recipe_folder, recipe_problem
from scripts.store import open_store

MODEL, NAME = "Qwen/Qwen3-30B-A3B-Instruct-2507", "Qwen--Qwen3-30B-A3B-Instruct-2507"
REVISION = "0123456789abcdef0123456789abcdef01234567"
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "moe_intermediate_size": 16, "num_experts": 4,
    "num_experts_per_tok": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy of the 30B as it is published: a tensor per expert and projection."""
    folder = tmp_path_factory.mktemp("hub") / "toy"
    AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SIZES)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.slow
def test_a_folder_is_converted_verified_repaired_and_taken_to_a_bucket(
    base: Path, tmp_path: Path, lorry: Any, s3: Any
) -> None:
    where = tmp_path / "models" / f"{NAME}.int8"
    done = lorry("stage", MODEL, "--quantize", "int8", "--from", str(base), "--revision", REVISION)
    assert done.code == 0, done.error
    assert done.out.startswith(f"{where.as_uri()}: staged: {MODEL}, revision {REVISION}, ")
    manifest = ModelManifest.model_validate_json((where / "manifest.json").read_bytes())
    assert (manifest.quantize, manifest.revision) == ("int8", REVISION)
    assert {"staged.json", "config.json", "tokenizer.json", "model.safetensors.index.json"} <= set(manifest.files)
    staged = json.loads((where / "staged.json").read_bytes())
    assert (staged["model"], staged["kind"], staged["revision"]) == (MODEL, "int8", REVISION)

    shard = where / "model-00002-of-00004.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    bad = lorry("stage", MODEL, "--quantize", "int8", "--verify")
    assert bad.code == 7
    assert f"{shard.name}: not the {len(data)} bytes of the manifest" in bad.error
    assert lorry("stage", MODEL, "--quantize", "int8", "--from", str(base)).code == 0, "sound files are kept"
    assert "every byte is right" in lorry("stage", MODEL, "--quantize", "int8", "--verify").out

    s3.create_bucket(Bucket="lorry-models")
    done = lorry("stage", MODEL, "--quantize", "int8", "--to", "s3://lorry-models/models")
    assert done.out.startswith(f"s3://lorry-models/models/{NAME}.int8: staged"), done.error
    there = verify_model(open_store("s3://lorry-models/models"), MODEL, quantize="int8")
    assert there.files == manifest.files

    recipe = load_recipe("qwen3-30b-a3b/zero3").recipe
    hardware = recipe.hardware.model_copy(update={"engine": "replica", "quantize": "int8"})
    assert recipe_problem(tmp_path / "models", recipe.model_copy(update={"hardware": hardware})) is None
    assert "there is no such folder" in (recipe_problem(tmp_path / "models", recipe) or ""), "its own files are not"


def test_what_cannot_be_converted_is_one_sentence(base: Path, tmp_path: Path, lorry: Any) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(base, odd)
    config = json.loads((odd / "config.json").read_bytes())
    (odd / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    done = lorry("stage", MODEL, "--quantize", "nf4", "--from", str(odd))
    assert (done.code, done.out) == (2, "")
    assert done.error == f"quantize: {odd}: it is quantised already; give the bf16 checkpoint of the model\n"
    assert not (tmp_path / "models" / f"{NAME}.nf4" / "manifest.json").exists()


def test_without_torch_it_says_where_to_run_it(base: Path, lorry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = lorry("stage", MODEL, "--quantize", "nf4", "--from", str(base))
    assert done.code == 2
    assert "quantize: torch is not installed here; pip install 'lorry[train]', or run" in done.error


def test_a_recipe_finds_its_quantised_folder_or_says_how_to_fill_it(tmp_path: Path) -> None:
    recipe = load_recipe("qwen3-next-80b/replica-int8").recipe
    folder = recipe_folder(tmp_path, recipe)
    assert folder == model_folder(tmp_path, recipe.base.id, "int8")
    assert folder.name == "Qwen--Qwen3-Next-80B-A3B-Instruct.int8"
    assert recipe_problem(tmp_path, recipe) == (
        f"{folder}: no int8 weights of {recipe.base.id}; fill that models folder with "
        f"`lorry stage {recipe.base.id} --quantize int8`"
    )
    assert making_commands(tmp_path, recipe) == []


def test_the_smoke_model_is_made_and_then_converted_where_a_recipe_wants_that(tmp_path: Path) -> None:
    recipe = load_recipe("smoke/zero3").recipe
    assert [command[2] for command in making_commands(tmp_path, recipe)] == ["trainer.smoke_model"]
    hardware = recipe.hardware.model_copy(update={"engine": "replica", "quantize": "nf4"})
    commands = making_commands(tmp_path, recipe.model_copy(update={"hardware": hardware}))
    assert [command[2] for command in commands] == ["trainer.smoke_model", "trainer.quantize"]
    assert str(tmp_path / "lorry--smoke.nf4") in commands[1]
