"""One expert layer, forward and backward, on CPU: ours against PEFT 0.21.2 with transformers' grouped_mm, same run.

python -m benchmarks.experts

Times are CPU seconds of one thread, the least of interleaved rounds; peaks are growth of the resident set in a fresh
process per variant. Speeds and peaks are taken in fp32, where both sides use the same fast products on any CPU.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.expert_layer import SCALE, Layer, Peer, Shape, Step, dense, make_layer, ours, reference, step_of
from benchmarks.processes import growth_mib, peak_of_a_process
from trainer.experts.lora_function import expert_mlp
from trainer.experts.projection import Call, Factors, Summation
from trainer.experts.quantised import Int8

ROUNDS = 6
FEW_ROWS = Shape(256, 512, 128, 1024, 10, 16)
MANY_ROWS = Shape(64, 512, 128, 4096, 8, 8)
FEW_ROWS_BF16 = Shape(64, 512, 128, 256, 10, 16, torch.bfloat16)
PEAK = Shape(64, 512, 128, 1024, 8, 8)
ACCURACY = Shape(16, 128, 64, 200, 4, 8)
SMALL_DELTA = Shape(8, 512, 256, 512, 4, 16, torch.bfloat16)
TRUE_WIDTHS = Shape(2, 2048, 512, 256, 1, 8)


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
    mib = {name: peak_of_a_process("benchmarks.experts", name) for name in ("peer", "keep", "recompute")}
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
    return growth_mib(step)


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


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--peak" in sys.argv:
        print(peak_mib(sys.argv[-1]))
    else:
        run()
