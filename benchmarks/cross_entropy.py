"""Cross-entropy of hidden states at a vocabulary of 151,936 on CPU: in chunks against all logits at once, same run.

python -m benchmarks.cross_entropy

Times are CPU seconds of one thread, the least of interleaved rounds; peaks are growth of the resident set in a fresh
process per variant. fp32, where a CPU's products are fast whatever its age.
"""

from __future__ import annotations

import sys
import time

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.processes import growth_mib, peak_of_a_process
from trainer.cross_entropy import chunked_cross_entropy

VOCABULARY, TOKENS, HIDDEN, ROWS_PER_CHUNK = 151_936, 1024, 256, 64
ROUNDS = 5
VARIANTS = ("full", "chunked", "chunked, half masked")


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and labels, all supervised."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    head = torch.randn(VOCABULARY, HIDDEN, generator=generator).mul_(HIDDEN**-0.5)
    return hidden, head, torch.randint(VOCABULARY, (TOKENS,), generator=generator)


def step(variant: str, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Loss and backward; the hidden states' gradient."""
    x = hidden.clone().requires_grad_()
    if variant == "full":
        loss = cross_entropy(torch.mm(x, head.t()).float(), labels, reduction="sum")
    else:
        masked = labels.clone()
        masked[: TOKENS // 2 if "masked" in variant else 0] = -100
        loss = chunked_cross_entropy(x, head, masked, ROWS_PER_CHUNK)
    loss.backward()
    assert x.grad is not None
    return x.grad


def peak_mib(variant: str) -> float:
    """Growth of this process's resident set during one step."""
    given = inputs()
    torch.mm(given[0][:8], given[1].t())  # the product's own buffers
    return growth_mib(lambda: step(variant, *given))


def run() -> dict[str, float]:
    """Both keys; prints the table."""
    torch.set_num_threads(1)
    given = inputs()
    seconds = dict.fromkeys(VARIANTS, float("inf"))
    for _ in range(ROUNDS):
        for variant in VARIANTS:
            begin = time.process_time()
            step(variant, *given)
            seconds[variant] = min(seconds[variant], time.process_time() - begin)
    mib = {variant: peak_of_a_process("benchmarks.cross_entropy", variant) for variant in VARIANTS[:2]}
    for variant in VARIANTS:
        print(f"{variant:<22}{seconds[variant]:>8.2f} s" + (f"{mib[variant]:>10.1f} MiB" if variant in mib else ""))
    results = {"ce_peak": mib["chunked"] / mib["full"], "ce_time": seconds["chunked"] / seconds["full"]}
    for name, value in results.items():
        print(f"{name:<22}{value:>10.4g}")
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--peak" in sys.argv:
        print(peak_mib(sys.argv[-1]))
    else:
        run()
