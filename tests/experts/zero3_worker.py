"""Trains a tiny model's expert LoRA under ZeRO-3 over the ranks of torchrun; rank 0 prints the losses as JSON."""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist

from tests.experts.families import TOKENS, tiny
from trainer.experts.module import attach_expert_lora

STEPS = 4


def prepare(family: str, checkpointing: bool):
    """The model in training mode, its stacks frozen, and its trainable factors."""
    model = tiny(family)
    model.requires_grad_(False)
    loras = attach_expert_lora(model, rank=4, alpha=8, keep_gate_up=not checkpointing)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    # A module whose inputs carry no gradient is not gathered again for backward.
    model.enable_input_require_grads()
    return model.train(), [p for lora in loras.values() for p in lora.parameters()]


def main(family: str, checkpointing: bool, prefetch: int) -> None:
    import deepspeed

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    model, factors = prepare(family, checkpointing)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": prefetch}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }
    adamw = torch.optim.AdamW(factors, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=config)
    # The ranks see other sequences: their experts get uneven numbers of tokens.
    mine = TOKENS[dist.get_rank() : dist.get_rank() + 1]
    losses = []
    for _ in range(STEPS):
        loss = engine(mine, labels=mine).loss
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    if dist.get_rank() == 0:
        print(json.dumps(losses))
    dist.barrier()
    os._exit(0)  # gloo's threads can abort a process that has done its work


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "checkpointing", int(sys.argv[3]))
