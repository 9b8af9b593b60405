"""A published FP8 checkpoint: decoded exactly as it is loaded, its attention trainable, its experts left alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from recipes.catalog import load_catalog
from recipes.recipe import Adapter
from trainer.base_files import BaseFiles
from trainer.load import load_whole
from trainer.precisions import refuse_surprises
from trainer.targets import attach, meta_model, named_trainable, plan_targets

FAMILY = load_catalog().families["qwen3_next"]
SIDE = 32
"Of the square blocks that share a scale; 128 in the published ones."
WHOLE = ("embed_tokens.weight", "lm_head.weight", "gate.weight", "in_proj_ba.weight")


def test_an_fp8_base_is_what_its_blocks_decode_to_and_takes_lora_on_attention(
    smoke_model: Path, jobs: Any, tmp_path: Path
) -> None:
    decoded = as_fp8(smoke_model, tmp_path / "fp8")
    files = BaseFiles(tmp_path / "fp8")
    model = load_whole(files, FAMILY, torch.float32, torch.device("cpu"), None)
    found = dict(model.named_parameters())
    assert "model.layers.3.self_attn.q_proj.weight" in decoded
    for name, weight in decoded.items():
        if name in found:
            assert torch.equal(found[name], weight), name
    experts = [decoded[f"model.layers.1.mlp.experts.{e}.down_proj.weight"] for e in range(8)]
    assert torch.equal(found["model.layers.1.mlp.experts.down_proj"], torch.stack(experts))

    adapter = Adapter(rank=4, targets=("attention", "shared_expert"))
    plan = plan_targets(meta_model(model.config, torch.float32), FAMILY, adapter)
    attach(model, FAMILY, adapter, plan, seed=1, dtype=torch.float32)
    hardware = {"engine": "replica", "quantize": None}
    changes = {"hardware": hardware, "adapter": adapter.model_dump(), "training": {"precision": "fp32"}}
    refuse_surprises(model, jobs.changed(jobs.recipe, changes))
    loss = model(input_ids=torch.arange(1, 9)[None], labels=torch.arange(1, 9)[None]).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in named_trainable(model).values())


def as_fp8(model: Path, to: Path) -> dict[str, torch.Tensor]:
    """Writes the model's large matrices as its publisher does, in e4m3 with a scale per block; what they decode to."""
    shutil.copytree(model, to)
    tensors, written, decoded = load_file(model / "model.safetensors"), {}, {}
    for name, weight in tensors.items():
        written[name] = weight
        if weight.ndim == 2 and not name.endswith(WHOLE) and not any(side % SIDE for side in weight.shape):
            rows, columns = (side // SIDE for side in weight.shape)
            blocks = weight.view(rows, SIDE, columns, SIDE)
            scales = blocks.abs().amax((1, 3), keepdim=True) / 448
            codes = (blocks / scales).to(torch.float8_e4m3fn)
            written[name] = codes.view(weight.shape)
            written[f"{name}_scale_inv"] = scales.view(rows, columns)
            decoded[name] = (codes.float() * scales).view(weight.shape)
    save_file(written, to / "model.safetensors", metadata={"format": "pt"})
    kept = [
        name.removesuffix(".weight") for name, weight in tensors.items() if weight.ndim == 2 and name not in decoded
    ]
    how = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [SIDE, SIDE]}
    config = json.loads((to / "config.json").read_bytes()) | {
        "quantization_config": how | {"modules_to_not_convert": kept}
    }
    (to / "config.json").write_text(json.dumps(config))
    return decoded
