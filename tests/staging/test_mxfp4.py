"""gpt-oss as it is published, its experts in MXFP4, becomes a bf16 model that says the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, Mxfp4Config

from recipes.job import read_record
from recipes.staged import STAGED, StagedModel
from tests.staging.conftest import logits
from trainer.base_files import BaseFiles
from trainer.failures import TrainingStopped
from trainer.quantize import quantise
from trainer.staged import load_staged

# E2M1: a sign, two bits of exponent and one of mantissa (OCP Microscaling Formats 1.0, section 5.3.3).
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
VALUES = torch.tensor(E2M1 + [-value for value in E2M1])
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy gpt-oss whose stacks are blocks of 32 random 4-bit values with a scale each, in the names of its makers."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
    config = GptOssConfig(num_hidden_layers=2, sliding_window=8, **sizes, **experts)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        count, inputs, outputs = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (count, outputs, inputs // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(121, 126, (count, outputs, inputs // 32), dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_bytes())
    written["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def test_mxfp4_becomes_the_bf16_model_that_transformers_reads_from_it(published: Path, tmp_path: Path) -> None:
    record = quantise(published, tmp_path / "to", "bf16", model="toy", revision=None, say=lambda done, total: None)
    model, read = load_staged(tmp_path / "to", torch.bfloat16, CPU)
    theirs = AutoModelForCausalLM.from_pretrained(
        published, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    )
    assert read == record == read_record(StagedModel, tmp_path / "to" / STAGED)
    assert record.parameters == {"bfloat16": sum(p.numel() for p in theirs.parameters())}
    assert torch.equal(logits(model), logits(theirs))
    assert BaseFiles(tmp_path / "to").quantised_by is None, "the trainer takes it"


def test_each_value_is_its_four_bits_times_its_power_of_two(published: Path) -> None:
    tensors, name = load_file(published / "model.safetensors"), "model.layers.1.mlp.experts.gate_up_proj"
    stack, blocks, scales = BaseFiles(published).tensor(name), tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
    for e, row, column in [(0, 0, 0), (3, 63, 63), (1, 17, 33), (2, 5, 10)]:  # of (experts, outputs, inputs)
        byte = int(blocks[e, row, column // 32, column % 32 // 2])
        value = VALUES[byte >> 4 if column % 2 else byte & 15] * 2.0 ** (int(scales[e, row, column // 32]) - 127)
        assert stack[e, column, row] == value


def test_what_does_not_become_bf16_is_refused(published: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingStopped, match="it is quantised already"):
        quantise(published, tmp_path / "to", "nf4", model="toy", revision=None, say=lambda done, total: None)
    quantise(published, tmp_path / "bf16", "bf16", model="toy", revision=None, say=lambda done, total: None)
    with pytest.raises(TrainingStopped, match="the experts of gpt_oss cannot be quantised"):
        quantise(tmp_path / "bf16", tmp_path / "to", "nf4", model="toy", revision=None, say=lambda done, total: None)
