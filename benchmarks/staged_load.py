"""Loading a staged model on CPU against transformers' from_pretrained of the layout it was published in, same run.

python -m benchmarks.staged_load

A toy of the 80B's family: 4 layers of 512 experts, 6,144 expert tensors, 0.83 GB in bf16, all in the page cache. CPU
seconds of loading per GB of weights read, user and system, imports left out; rounds interleaved, the least counts. Each
round loads twice: the first finds memory that a virtual machine must first get from its host, which is nobody's merit.
"""

from __future__ import annotations

import gc
import tempfile
import time
from pathlib import Path

import torch

ROUNDS = 4
KINDS = ("int8", "nf4")
SIZES = {
    "vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 4, "intermediate_size": 512,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "num_experts": 512, "num_experts_per_tok": 10,
    "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128, "linear_num_key_heads": 4,
    "linear_num_value_heads": 8, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
}  # fmt: skip


def make(folder: Path) -> None:
    """The published layout, and the staged ones beside it."""
    from transformers import AutoModelForCausalLM, Qwen3NextConfig

    from trainer.quantize import quantise

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3NextConfig(**SIZES), dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    for number, parameter in enumerate(model.parameters()):
        parameter.data.fill_(0.01 * (number + 1))  # which numbers does not matter here
    model.save_pretrained(folder / "published", max_shard_size="200MB")
    for kind in KINDS:
        quantise(folder / "published", folder / kind, kind, model="toy", revision=None, say=lambda done, total: None)


def seconds(folder: Path) -> float:
    """CPU seconds of one load."""
    from transformers import AutoModelForCausalLM

    from trainer.staged import load_staged

    begin = time.process_time()
    if folder.name == "published":
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, experts_implementation="grouped_mm")
    else:
        load_staged(folder, torch.bfloat16, torch.device("cpu"))
    taken = time.process_time() - begin
    gc.collect()  # a model holds itself in a circle
    return taken


def run() -> dict[str, float]:
    """The key: the larger ratio of int8 and NF4; prints the table."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    least = dict.fromkeys(("published", *KINDS), float("inf"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        gb = {kind: sum(p.stat().st_size for p in (folder / kind).glob("*.safetensors")) / 1e9 for kind in least}
        for _ in range(ROUNDS):
            for kind in (kind for kind in least for _ in range(2)):
                least[kind] = min(least[kind], seconds(folder / kind) / gb[kind])
    for kind, value in least.items():
        ratio = value / least["published"]
        print(f"{kind:<12}{gb[kind]:>6.2f} GB{value:>8.3f} s/GB{ratio:>8.3f} of from_pretrained per GB, "
              f"{ratio * gb[kind] / gb['published']:.3f} in all")  # fmt: skip
    return {"staged_load_cpu": max(least["int8"], least["nf4"]) / least["published"]}


if __name__ == "__main__":
    run()
