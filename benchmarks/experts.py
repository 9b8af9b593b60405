"""One expert layer, forward and backward, on CPU: ours against PEFT 0.21.2 with transformers' grouped_mm, same run.

python -m benchmarks.experts

Times are CPU seconds of one thread, the least of interleaved rounds; peaks are growth of the resident set in a fresh
process per variant. Speeds and peaks are taken in fp32, where both sides use the same fast products on any CPU.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from trainer.experts.layouts import from_peft, to_peft
from trainer.experts.lora_function import expert_mlp
from trainer.experts.projection import Call, Factors, Summation
from trainer.experts.quantised import Int8
from trainer.experts.storage import Dense, FrozenStack

ROUNDS = 6
SCALE = 2.0
# The kernel gives freed blocks back at once; otherwise the resident set says nothing about peaks.
HONEST_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

Step = Callable[[], None]


@dataclass(frozen=True)
class Shape:
    """One layer and its tokens."""

    experts: int
    hidden: int
    width: int
    tokens: int
    per_token: int
    rank: int
    dtype: torch.dtype = torch.float32

    @property
    def rows(self) -> float:
        """Rows per expert."""
        return self.tokens * self.per_token / self.experts


FEW_ROWS = Shape(256, 512, 128, 1024, 10, 16)
MANY_ROWS = Shape(64, 512, 128, 4096, 8, 8)
FEW_ROWS_BF16 = Shape(64, 512, 128, 256, 10, 16, torch.bfloat16)
PEAK = Shape(64, 512, 128, 1024, 8, 8)
ACCURACY = Shape(16, 128, 64, 200, 4, 8)
SMALL_DELTA = Shape(8, 512, 256, 512, 4, 16, torch.bfloat16)
TRUE_WIDTHS = Shape(2, 2048, 512, 256, 1, 8)


@dataclass(frozen=True)
class Layer:
    """Random weights in the size that initialisation gives, tokens, routes, and an upstream gradient."""

    gate_up: Tensor
    down: Tensor
    factors: Factors
    x: Tensor
    index: Tensor
    weight: Tensor
    gradient: Tensor

    def to(self, dtype: torch.dtype) -> Layer:
        """The same numbers in another precision."""
        cast = {k: v if k == "index" else v.to(dtype) for k, v in vars(self).items() if k != "factors"}
        return Layer(**cast, factors=Factors(*(f.to(dtype) for f in self.factors)))


def make_layer(shape: Shape, dtype: torch.dtype | None = None, seed: int = 0) -> Layer:
    """A layer of this shape; routes are uniform and never name an expert twice for one token."""
    dtype = dtype or shape.dtype
    e, h, i, r = shape.experts, shape.hidden, shape.width, shape.rank
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).mul_(std).to(dtype)

    return Layer(
        gate_up=normal(e, 2 * i, h, std=h**-0.5),
        down=normal(e, h, i, std=i**-0.5),
        factors=Factors(
            normal(e, r, h, std=h**-0.5),
            normal(e, 2 * i, r, std=0.1),
            normal(e, r, i, std=i**-0.5),
            normal(e, h, r, std=0.1),
        ),
        x=normal(shape.tokens, h),
        index=torch.rand(shape.tokens, e, generator=generator).topk(shape.per_token).indices,
        weight=torch.softmax(normal(shape.tokens, shape.per_token).double(), 1).to(dtype),
        gradient=normal(shape.tokens, h),
    )


def ours(
    layer: Layer,
    stacks: tuple[FrozenStack, FrozenStack],
    summation: Summation = "split",
    keep: bool = True,
    experts_per_block: int | None = 1,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Our function on this layer's factors, as a function of tokens and routing weights."""
    call = Call(*stacks, SCALE, summation, keep, experts_per_block)
    factors = Factors(*(f.requires_grad_() for f in layer.factors))
    return lambda x, weight: expert_mlp(x, layer.index, weight, factors, call)


def dense(layer: Layer, columns: int = 0) -> tuple[Dense, Dense]:
    """The layer's frozen weights as they are."""
    return Dense(layer.gate_up, columns), Dense(layer.down, columns)


class Peer(nn.Module):
    """PEFT's LoRA on both fused parameters over transformers' grouped_mm experts, holding the same numbers."""

    def __init__(self, layer: Layer):
        from peft import LoraConfig, get_peft_model
        from transformers import Qwen3NextConfig
        from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextExperts

        super().__init__()
        count, rank, hidden = layer.factors.gate_up_a.shape
        config = Qwen3NextConfig(num_experts=count, hidden_size=hidden, moe_intermediate_size=layer.down.shape[2])
        config._experts_implementation = "grouped_mm"
        base = _Holder(Qwen3NextExperts(config).to(layer.x.dtype))
        base.experts.gate_up_proj.data, base.experts.down_proj.data = layer.gate_up, layer.down
        parameters = ["experts.gate_up_proj", "experts.down_proj"]
        lora = LoraConfig(r=rank, lora_alpha=round(SCALE * rank), target_modules=[], target_parameters=parameters)
        self.model = get_peft_model(base, lora, autocast_adapter_dtype=False)
        self._named = {k.replace(".default", ""): p for k, p in self.model.named_parameters() if p.requires_grad}
        for key, tensor in to_peft({"experts": layer.factors}).items():
            self._named[key].data = tensor.clone()
        self.index, self.experts = layer.index, count

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """y of tokens and routing weights."""
        return self.model(x, self.index, weight)

    def factor_gradients(self) -> Factors:
        """The gradients of A and B in our order."""
        return from_peft({key: parameter.grad for key, parameter in self._named.items()}, self.experts)["experts"]


class _Holder(nn.Module):
    def __init__(self, experts: nn.Module):
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return self.experts(x, index, weight)


def reference(layer: Layer, factors: Factors, x: Tensor, weight: Tensor) -> Tensor:
    """y with every delta written out, differentiable; in the layer's own precision."""
    gate_up = layer.gate_up + SCALE * factors.gate_up_b @ factors.gate_up_a
    down = layer.down + SCALE * factors.down_b @ factors.down_a
    y = torch.zeros_like(x)
    for e in range(len(gate_up)):
        token, slot = torch.where(layer.index == e)
        gate, up = linear(x[token], gate_up[e]).chunk(2, 1)
        y = y.index_add(0, token, linear(silu(gate) * up, down[e]) * weight[token, slot, None])
    return y


def step_of(function: Callable[[Tensor, Tensor], Tensor], layer: Layer) -> Step:
    """One forward and backward."""

    def step() -> None:
        x, weight = layer.x.clone().requires_grad_(), layer.weight.clone().requires_grad_()
        function(x, weight).backward(layer.gradient)

    return step


def least_seconds(steps: dict[str, Step], rounds: int = ROUNDS) -> dict[str, float]:
    """The least CPU time of each step over interleaved rounds, after one to warm up."""
    least = dict.fromkeys(steps, float("inf"))
    for number in range(rounds + 1):
        for name, step in steps.items():
            gc.collect()
            begin = time.process_time()
            step()
            if number:
                least[name] = min(least[name], time.process_time() - begin)
    return least


def speeds() -> dict[str, float]:
    """How many times faster than the peer at 40 and at 512 rows per expert; the slower of both summations counts."""
    results = {}
    for key, shape in (("expert_speedup_40", FEW_ROWS), ("expert_speedup_512", MANY_ROWS)):
        layer = make_layer(shape)
        seconds = least_seconds(
            {
                "PEFT + grouped_mm": step_of(Peer(layer), layer),
                "ours, split": step_of(ours(layer, dense(layer)), layer),
                "ours, accumulator": step_of(ours(layer, dense(layer, shape.rank), "accumulator"), layer),
            }
        )
        _print_seconds(f"{shape.rows:.0f} rows per expert, fp32", seconds)
        results[key] = seconds["PEFT + grouped_mm"] / max(seconds["ours, split"], seconds["ours, accumulator"])
    return results


def peaks() -> dict[str, float]:
    """The extra memory of one step over the peer's, keeping and recomputing the gate_up product."""
    mib = {}
    for name in ("peer", "keep", "recompute"):
        command = [sys.executable, "-m", "benchmarks.experts", "--peak", name]
        done = subprocess.run(
            command,
            cwd=Path(__file__).parent.parent,
            env=os.environ | HONEST_MALLOC,
            capture_output=True,
            text=True,
            check=True,
        )
        mib[name] = float(done.stdout.split()[-1])
    print("extra peak of one step: " + ", ".join(f"{name} {value:.1f} MiB" for name, value in mib.items()))
    return {"expert_memory": mib["keep"] / mib["peer"], "expert_memory_recompute": mib["recompute"] / mib["peer"]}


def peak_mib(name: str) -> float:
    """Growth of this process's resident set during one step, after one to warm up."""
    layer = make_layer(PEAK)
    function = Peer(layer) if name == "peer" else ours(layer, dense(layer), keep=name == "keep")
    step = step_of(function, layer)
    step()
    for tensor in function.parameters() if isinstance(function, Peer) else layer.factors:
        tensor.grad = None
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_mib("VmRSS")
    step()
    return _status_mib("VmHWM") - before


def errors() -> dict[str, float]:
    """The worst relative error of any gradient against float64, and in bf16 the worst ratio to the peer's."""
    results = {}
    for key, dtype in (("grad_error_f64", torch.float64), ("grad_error_f32", torch.float32)):
        layer = make_layer(ACCURACY, dtype)
        results[key] = max(e for errors in _our_errors(layer) for e in errors)
    layer = make_layer(ACCURACY, torch.bfloat16)
    peer = Peer(layer)
    theirs = _gradient_errors(peer, layer, lambda: peer.factor_gradients())
    print("bf16 gradient errors of PEFT: " + ", ".join(f"{e:.2e}" for e in theirs))
    ratios = [a / b for mine in _our_errors(layer) for a, b in zip(mine, theirs, strict=True)]
    return results | {"grad_error_bf16_ratio": max(ratios)}


def delta_share(summation: Summation | None) -> float:
    """The share of a LoRA contribution of 1e-3 of the weights that reaches the layer's bf16 output; None is PEFT's."""
    layer = _with_small_delta(make_layer(SMALL_DELTA), 1e-3)
    nothing = Factors(*(torch.zeros_like(f) for f in layer.factors))
    without = dataclasses.replace(layer, factors=nothing)
    exact, x, weight = layer.to(torch.float64), layer.x.double(), layer.weight.double()
    with torch.no_grad():
        true = reference(exact, exact.factors, x, weight) - reference(
            exact, without.to(torch.float64).factors, x, weight
        )
        pair = []
        for this in (layer, without):
            if summation is None:
                pair.append(Peer(this)(this.x, this.weight).double())
            else:
                stacks = dense(this, SMALL_DELTA.rank if summation == "accumulator" else 0)
                # All experts at once: the arithmetic of a GPU.
                pair.append(ours(this, stacks, summation, experts_per_block=None)(this.x, this.weight).double())
    return float(((pair[0] - pair[1]) * true).sum() / true.square().sum())


def int8() -> dict[str, float]:
    """Time over the peer's in its own precision (the worse of bf16 and fp32); bytes and output error at true widths."""
    ratios = []
    for shape in (FEW_ROWS_BF16, FEW_ROWS):
        layer = make_layer(shape)
        stacks = _int8(layer)
        steps = {"PEFT + grouped_mm": step_of(Peer(layer), layer)}
        steps["ours, int8, accumulator"] = step_of(ours(layer, stacks, "accumulator"), layer)
        seconds = least_seconds(steps)
        _print_seconds(f"{shape.rows:.0f} rows per expert, {shape.dtype}, int8 against PEFT", seconds)
        ratios.append(seconds["ours, int8, accumulator"] / seconds["PEFT + grouped_mm"])
    layer = make_layer(TRUE_WIDTHS)
    stacks = _int8(layer)
    outputs = []
    for pair in (stacks, dense(layer)):
        outputs.append(expert_mlp(layer.x, layer.index, layer.weight, None, Call(*pair, experts_per_block=1)))
    held = sum(stack.bytes_per_parameter * stack.out_features * stack.in_features for stack in stacks)
    return {
        "int8_time": max(ratios),
        "int8_bytes": held / sum(stack.out_features * stack.in_features for stack in stacks),
        "int8_error": _relative(outputs[0], outputs[1]),
    }


def run() -> dict[str, float]:
    """All keys; prints the table."""
    torch.set_num_threads(1)
    results = speeds() | peaks() | errors() | {"delta_share": delta_share("accumulator")} | int8()
    print(f"delta share: PEFT {delta_share(None):.3f}, ours with split summation {delta_share('split'):.3f}")
    for name, value in results.items():
        print(f"{name:<26}{value:>12.4g}")
    return results


def _our_errors(layer: Layer) -> list[list[float]]:
    """Per way of computing, the errors of all gradients. torch's grouped_mm has no float64."""
    found = []
    for experts_per_block in (1,) if layer.x.dtype == torch.float64 else (1, None):
        for summation, columns in (("split", 0), ("accumulator", ACCURACY.rank)):
            layer.factors.gate_up_a.grad = None
            for factor in layer.factors:
                factor.grad = None
            function = ours(layer, dense(layer, columns), summation, experts_per_block=experts_per_block)
            found.append(_gradient_errors(function, layer, lambda: Factors(*(f.grad for f in layer.factors))))
    return found


def _gradient_errors(
    function: Callable[[Tensor, Tensor], Tensor], layer: Layer, factor_gradients: Callable[[], Factors]
) -> list[float]:
    """Relative errors of d x, d weight and the factors' gradients against float64 on the same, rounded, numbers."""
    x, weight = layer.x.clone().requires_grad_(), layer.weight.clone().requires_grad_()
    function(x, weight).backward(layer.gradient)
    exact = layer.to(torch.float64)
    leaves = [t.detach().clone().requires_grad_() for t in (exact.x, exact.weight, *exact.factors)]
    reference(exact, Factors(*leaves[2:]), leaves[0], leaves[1]).backward(exact.gradient)
    return [_relative(a, b.grad) for a, b in zip((x.grad, weight.grad, *factor_gradients()), leaves, strict=True)]


def _with_small_delta(layer: Layer, share: float) -> Layer:
    """B scaled so that each delta is `share` of its weights, both as root mean squares."""
    factors = layer.factors._asdict()
    for name, weights in (("gate_up", layer.gate_up), ("down", layer.down)):
        a, b = factors[f"{name}_a"].double(), factors[f"{name}_b"].double()
        size = (SCALE * b @ a).square().mean().sqrt() / weights.double().square().mean().sqrt()
        factors[f"{name}_b"] = (b * (share / size)).to(layer.x.dtype)
    return dataclasses.replace(layer, factors=Factors(**factors))


def _int8(layer: Layer) -> tuple[Int8, Int8]:
    return Int8.quantise(layer.gate_up, len(layer.gate_up)), Int8.quantise(layer.down, len(layer.down))


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def _print_seconds(title: str, seconds: dict[str, float]) -> None:
    print(f"{title}: " + ", ".join(f"{name} {value:.3f} s" for name, value in seconds.items()))


def _status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--peak" in sys.argv:
        print(peak_mib(sys.argv[-1]))
    else:
        run()
