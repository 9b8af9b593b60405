"""The whole 80B and one of its expert layers on one H200 or H100, with random weights at true shape.

python -m benchmarks.h200 --out h200.json                     # at most 10 minutes; --wheels DIR installs wheels first
python -m benchmarks.h200 --device cpu --layers 2 --experts 8 --hidden 64 --vocabulary 400 --tokens 64  # the same code

Per case: tokens per second, peak GiB that torch reserved and what the planner said, and whether the loss of one batch
falls when it is trained again and again. NF4 runs under a cap of 80 GB. The layer runs against PEFT 0.21.2 over
grouped_mm, and against the sum of its arithmetic and memory time at attainable rates.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

GIB = 2**30
CAP_BYTES = 80e9
H200_TFLOPS, H200_GB_PER_SECOND = 790, 4300
"Attainable, not the data sheet's."
MODEL = "Qwen/Qwen3-Next-80B-A3B-Instruct"
ADAPTERS = {"experts r16": (16, ("experts",)), "attention r32": (32, ("attention", "linear_attention"))}
WARM_UP = 2
"Steps that are not timed."
LEARNING_RATE = 2e-4


@dataclass(frozen=True)
class Case:
    """One run of the whole model."""

    kind: str
    adapter: str
    tokens: int
    tokens_per_second: float
    step_seconds: float
    peak_gib: float | None
    planned_gib: float
    losses: tuple[float, ...]

    @property
    def falls(self) -> bool:
        """Whether the loss is lower after the last step than before the first."""
        return self.losses[-1] < self.losses[0]


def main(words: Sequence[str] | None = None) -> int:
    """Runs all cases, prints the table, writes the JSON. 1 when a loss does not fall, else 0."""
    asked = _arguments(words)
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if asked.wheels:
        _install(asked.wheels)
    import torch

    shape = _shape(asked)
    found: dict[str, Any] = {"machine": _machine(asked.device), "layer": one_layer(shape, asked)}
    cases: list[Case] = []
    for kind in ("nf4", "int8"):
        if asked.device == "cuda":
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, CAP_BYTES / total) if kind == "nf4" else 1.0)
        for adapter in ADAPTERS:
            cases += whole_model(shape, kind, adapter, asked)
            found["cases"] = [asdict(case) | {"falls": case.falls} for case in cases]
            if asked.out:
                asked.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found, cases))
    return 0 if all(case.falls for case in cases) else 1


def one_layer(shape: Any, asked: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of one checkpointed expert layer, forward, again and backward, by way, and the roofline's."""
    import torch
    from torch.utils.checkpoint import checkpoint

    from benchmarks.expert_layer import Peer, Shape, dense, make_layer, ours, step_of
    from trainer.experts.quantised import Int8

    dtype = torch.bfloat16 if asked.device == "cuda" else torch.float32
    sizes = (shape.experts, shape.hidden, shape.expert_intermediate, asked.layer_tokens, shape.experts_per_token, 16)
    layer = make_layer(Shape(*sizes, dtype), device=asked.device)
    at_once = None if asked.device == "cuda" else 1
    int8 = Int8.quantise(layer.gate_up, shape.experts), Int8.quantise(layer.down, shape.experts)
    ways: dict[str, Any] = {
        "PEFT + grouped_mm": lambda: Peer(layer),
        "ours, bf16": lambda: ours(layer, dense(layer, 16), "accumulator", experts_per_block=at_once),
        "ours, int8": lambda: ours(layer, int8, "accumulator", experts_per_block=at_once),
    }
    found = {}
    for name, make in ways.items():
        step = step_of(partial(checkpoint, make(), use_reentrant=False), layer)
        found[name] = 1e3 * statistics.median(_seconds(step, asked.device) for _ in range(asked.steps))
        del step
        _free(asked.device)
    found["roofline"] = roofline_ms(shape, asked.layer_tokens, 16)
    return found


def roofline_ms(shape: Any, tokens: int, rank: int) -> float:
    """Three passes over an expert layer with its LoRA, no gradient of a frozen weight: arithmetic plus memory time.

    Per route and pass 2 x (3HI + r (2H + 3I)) FLOP; bf16 weights once a pass; of a route's values 12H + 18I in all.
    At 8,192 tokens of the 80B's layer 2.0 + 3.5 ms on an H200.
    """
    hidden, width, routes = shape.hidden, shape.expert_intermediate, tokens * shape.experts_per_token
    flop = 3 * routes * 2 * (3 * hidden * width + rank * (2 * hidden + 3 * width))
    moved = 3 * shape.experts * 3 * hidden * width * 2 + routes * (12 * hidden + 18 * width) * 2
    return 1e3 * (flop / (H200_TFLOPS * 1e12) + moved / (H200_GB_PER_SECOND * 1e9))


def whole_model(shape: Any, kind: str, adapter: str, asked: argparse.Namespace) -> list[Case]:
    """The model with one adapter, trained on one batch per number of tokens."""
    import torch

    from benchmarks.random_model import attach_adapter, random_model
    from recipes.catalog import load_catalog
    from recipes.recipe import Adapter
    from trainer.adamw_8bit import AdamW8bit
    from trainer.loss import WithLoss

    family = load_catalog().family_of(MODEL)
    rank, targets = ADAPTERS[adapter]
    dtype = torch.bfloat16 if asked.device == "cuda" else torch.float32
    begun = time.perf_counter()
    model = random_model(shape, family, kind, dtype, asked.device)  # type: ignore[arg-type]
    wanted = Adapter(rank=rank, alpha=rank, targets=targets)  # type: ignore[arg-type]
    trained = attach_adapter(model, family, wanted, dtype)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    print(f"{kind}, {adapter}: made in {time.perf_counter() - begun:.0f} s", flush=True)
    optimizer = AdamW8bit(trained, lr=LEARNING_RATE, weight_decay=0.0)
    cases = []
    for tokens in asked.tokens:
        losses, seconds, peak = _train(WithLoss(model), optimizer, tokens, shape.vocabulary, asked)
        planned = planned_gib(shape, family, wanted, kind, tokens)
        likely = statistics.median(seconds[WARM_UP:])
        cases.append(Case(kind, adapter, tokens, tokens / likely, likely, peak, planned, tuple(losses)))
        print(f"  {tokens:>6} tokens: {likely:.2f} s a step, loss {losses[0]:.3f} -> {losses[-1]:.3f}", flush=True)
    del model, trained, optimizer
    _free(asked.device)
    return cases


def planned_gib(shape: Any, family: Any, adapter: Any, kind: str, tokens: int) -> float:
    """What the planner says torch will reserve: fp32 adapter, bf16 gradients, 8-bit moments."""
    from scripts.plan.memory import ALLOCATOR_GIB, SLACK, Batch, memory_terms
    from scripts.plan.parameters import targeted
    from scripts.plan.storage import MOMENT_BLOCK, Storage

    moments = 2 * (1 + 4 / MOMENT_BLOCK)
    storage = Storage(1, kind, 2, 4, 2, moments, "lean", partitioned=False)  # type: ignore[arg-type]
    terms = memory_terms(shape, targeted(shape, family, adapter), adapter.rank, storage, Batch(tokens, tokens))
    return (1 + SLACK) * sum(term.size for term in terms) / GIB + ALLOCATOR_GIB


def table(found: dict[str, Any], cases: Sequence[Case]) -> str:
    """Everything for a person."""
    lines = [found["machine"], "one expert layer, checkpointed, forward and backward, ms"]
    lines += [f"  {name:<22}{value:>10.2f}" for name, value in found["layer"].items()]
    lines.append(f"{'the whole model':<24}{'tokens':>8}{'tok/s':>9}{'peak GiB':>10}{'planned':>9}  loss")
    for case in cases:
        peak = "-" if case.peak_gib is None else f"{case.peak_gib:.1f}"
        falls = f"{case.losses[0]:.3f} -> {case.losses[-1]:.3f}" + ("" if case.falls else "  DOES NOT FALL")
        name = f"{case.kind}, {case.adapter}"
        lines.append(
            f"  {name:<22}{case.tokens:>8}{case.tokens_per_second:>9,.0f}{peak:>10}{case.planned_gib:>9.1f}  {falls}"
        )
    return "\n".join(lines)


def _train(
    model: Any, optimizer: Any, tokens: int, vocabulary: int, asked: argparse.Namespace
) -> tuple[list[float], list[float], float | None]:
    """Losses, seconds and peak GiB of a few steps on one random batch, in rows of at most --row tokens."""
    import torch

    _free(asked.device)
    on_gpu = asked.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    rows = max(1, tokens // asked.row)
    ids = torch.randint(vocabulary, (rows, tokens // rows), device=asked.device)
    losses: list[float] = []

    def step() -> None:
        loss = model(input_ids=ids, labels=ids) / ids.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))

    seconds = [_seconds(step, asked.device) for _ in range(asked.steps)]
    return losses, seconds, torch.cuda.max_memory_reserved() / GIB if on_gpu else None


def _seconds(step: Any, device: str) -> float:
    import torch

    begun = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _free(device: str) -> None:
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _shape(asked: argparse.Namespace) -> Any:
    """The 80B's shape, or with --layers and the like a small one of its kind."""
    from recipes.catalog import load_catalog

    shape = load_catalog().models[MODEL].shape
    assert shape.linear_attention is not None
    if asked.layers:
        attention = asked.layers // 4
        linear = shape.linear_attention.model_copy(update={"layers": asked.layers - attention})
        shape = shape.model_copy(
            update={"layers": asked.layers, "attention_layers": attention, "linear_attention": linear}
        )
    small = {"experts": asked.experts, "hidden": asked.hidden, "vocabulary": asked.vocabulary}
    small |= {"expert_intermediate": asked.width, "shared_expert_intermediate": asked.width, "head_dim": asked.head}
    shape = shape.model_copy(update={name: value for name, value in small.items() if value})
    if asked.head:
        assert shape.linear_attention is not None
        narrow = {"key_head_dim": asked.head, "value_head_dim": asked.head, "key_heads": 2, "value_heads": 4}
        shape = shape.model_copy(
            update={"heads": 4, "linear_attention": shape.linear_attention.model_copy(update=narrow)}
        )
    return shape.model_copy(update={"experts_per_token": min(shape.experts_per_token, shape.experts)})


def _machine(device: str) -> str:
    import torch
    import transformers

    name = torch.cuda.get_device_name(0) if device == "cuda" else "cpu"
    kernels = []
    for package in ("fla", "causal_conv1d"):
        try:
            __import__(package)
            kernels.append(package)
        except ImportError:
            kernels.append(f"no {package} (slow)")
    return f"{name}; torch {torch.__version__}, transformers {transformers.__version__}, {', '.join(kernels)}"


def _install(wheels: Path) -> None:
    """The wheels of a folder, from nowhere else, for this process alone."""
    target = tempfile.mkdtemp(prefix="lorry-wheels-")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", target]
    subprocess.run([*command, *map(str, sorted(wheels.glob("*.whl")))], check=True)
    sys.path.insert(0, target)


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.h200", description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="where the JSON goes, after every case")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install first, such as fla-core")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384], help="per step")
    parser.add_argument("--row", type=int, default=4096, help="tokens of one sequence")
    parser.add_argument("--layer-tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=7, help=f"of each case; the first {WARM_UP} are not timed")
    for name in ("layers", "experts", "hidden", "width", "head", "vocabulary"):
        parser.add_argument(f"--{name}", type=int, help="another size than the 80B's")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
