"""A staged model says what its rounded weights say, is read in one checked pass, and refused when it is not whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from recipes.job import read_record, write_record
from recipes.staged import STAGED, StagedModel
from tests.staging.conftest import FAMILIES, logits
from trainer.base_files import BaseFiles
from trainer.experts.quantised import Int8, Nf4
from trainer.failures import TrainingStopped
from trainer.quantize import quantise
from trainer.staged import load_staged

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkvz", "in_proj_qkv", "in_proj_z", "out_proj",
           "gate_proj", "up_proj", "down_proj")  # fmt: skip
CPU = torch.device("cpu")


def staged(base: Path, to: Path, kind: str) -> StagedModel:
    return quantise(base, to, kind, model="toy", revision=None, say=lambda done, total: None)


def rounded(base: Path, kind: str) -> Any:
    """The base with every large matrix replaced, one at a time, by what its storage decodes to."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    quantiser = {"int8": Int8, "nf4": Nf4}[kind]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stack = parameter if parameter.dim() == 3 and ".experts." in name else parameter[None]
            if (parameter.dim() == 3 and ".experts." in name) or name.split(".")[-2] in LINEARS:
                stored = quantiser.quantise(stack, len(stack))
                parameter.copy_(stored.dequantise(0, len(stack), torch.float32).view_as(parameter))
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["int8", "nf4", "bf16"])
def test_a_staged_model_says_what_its_rounded_weights_say(family: str, kind: str, base: Any, tmp_path: Path) -> None:
    folder = base(family)
    record = staged(folder, tmp_path / "to", kind)
    model, read = load_staged(tmp_path / "to", torch.float32, CPU)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = plain if kind == "bf16" else rounded(folder, kind)
    torch.testing.assert_close(logits(model), logits(wanted), rtol=1e-4, atol=1e-4)
    if kind != "bf16":
        assert (logits(model) - logits(plain)).abs().max() > 1e-3, "it is quantised"
    assert read == record
    assert record.base_sha256 == BaseFiles(folder).sha256()
    assert sum(record.parameters.values()) == sum(p.numel() for p in plain.parameters())
    assert record.parameters.get("float32", 0) < sum(record.parameters.values()) / 3 or kind == "bf16"
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= {p.name for p in (tmp_path / "to").iterdir()}
    assert not any(p.requires_grad for p in model.parameters())


def test_files_hold_the_names_of_the_modules_in_the_order_of_the_layers(base: Any, tmp_path: Path) -> None:
    record = staged(base("qwen3_next"), tmp_path, "int8")
    keys = [sorted(load_file(tmp_path / name)) for name in record.files]
    assert len(keys) == 4, "embedding, two layers, norm and head"
    assert keys[0] == ["model.embed_tokens.weight"]
    assert "model.layers.0.mlp.experts.gate_up_proj.codes" in keys[1]
    assert "model.layers.1.self_attn.q_proj.storage.codes" in keys[2]
    assert keys[3] == ["lm_head.weight", "model.norm.weight"]
    model, _ = load_staged(tmp_path, torch.float32, CPU)
    assert set(model.state_dict()) == {key for file in keys for key in file}


def test_what_is_not_quantised_comes_in_the_asked_precision_and_scales_do_not(base: Any, tmp_path: Path) -> None:
    staged(base("qwen3_next"), tmp_path, "nf4")
    model, _ = load_staged(tmp_path, torch.bfloat16, CPU)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for n, b in model.named_buffers() if n.endswith("scale_steps")} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16


def test_converting_again_only_looks_and_never_turns_one_model_into_another(base: Any, tmp_path: Path) -> None:
    first = staged(base("qwen3_next"), tmp_path, "int8")
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("model-*")}
    assert staged(base("qwen3_next"), tmp_path, "int8") == first
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("model-*")} == before
    for other, kind in ((base("qwen3_moe"), "int8"), (base("qwen3_next"), "nf4")):
        with pytest.raises(TrainingStopped, match="holds int8 of another base; name another folder"):
            staged(other, tmp_path, kind)


@pytest.fixture
def copy(base: Any, tmp_path: Path) -> Path:
    """A staged model, free to be damaged."""
    staged(base("qwen3_next"), tmp_path / "copy", "int8")
    return tmp_path / "copy"


def refused(folder: Path, sentence: str) -> None:
    with pytest.raises(TrainingStopped, match=sentence) as stopped:
        load_staged(folder, torch.float32, CPU)
    assert stopped.value.cause == "bad_base_model"


SHARDS = [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]


@pytest.mark.parametrize("at", [-1, 4000, 12])
def test_one_wrong_bit_is_found_on_the_way(at: int, copy: Path) -> None:
    data = bytearray((copy / SHARDS[1]).read_bytes())
    data[at] ^= 1
    (copy / SHARDS[1]).write_bytes(data)
    refused(copy, "its checksum differs from copy's record|not a safetensors file|tensors differ|storage")


def test_a_file_that_is_cut_off_or_missing_is_found_before_anything_is_read(copy: Path) -> None:
    data = (copy / SHARDS[2]).read_bytes()
    (copy / SHARDS[2]).write_bytes(data[:-10])
    refused(copy, f"{SHARDS[2]}: {len(data) - 10} bytes, staged.json says {len(data)}")
    (copy / SHARDS[2]).unlink()
    refused(copy, f"{SHARDS[2]}: missing; stage the model again")
    (copy / STAGED).unlink()
    refused(copy, "no staged.json; stage the model with `lorry stage MODEL --quantize")


def test_a_model_of_other_parameters_than_its_record_is_refused(copy: Path) -> None:
    record = read_record(StagedModel, copy / STAGED)
    assert record is not None
    moved = record.parameters | {"int8": record.parameters["int8"] - 64, "float32": record.parameters["float32"] + 64}
    write_record(copy / STAGED, record.model_copy(update={"parameters": moved}))
    refused(copy, r"its files hold \{'float32': \d+, 'int8': \d+\} weights, its staged.json says")


def test_a_model_without_one_of_its_files_is_refused(copy: Path) -> None:
    record = read_record(StagedModel, copy / STAGED)
    assert record is not None
    fewer = {name: file for name, file in record.files.items() if name != SHARDS[3]}
    write_record(copy / STAGED, record.model_copy(update={"files": fewer}))
    refused(copy, r"2 tensors differ, first: lm_head.weight is missing in the files and \(100, 64\) in the model")


def test_a_model_of_other_shapes_than_its_configuration_is_refused(base: Any, copy: Path) -> None:
    other = base("qwen3_next", moe_intermediate_size=16)
    shutil.copy(other / "config.json", copy / "config.json")
    refused(copy, r"experts\.(gate_up|down)_proj: storage of shape .* the model wants .*; stage the model again")
