"""Seconds of one forward and backward pass, and of what an optimizer step adds, term by term.

pass = FLOP / attainable rate + bytes / memory rate + exposed gather + layers x launch cost
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recipes.catalog import Gpu, Shape
from scripts.plan.memory import frozen_term
from scripts.plan.parameters import Matrix, matrices
from scripts.plan.storage import Storage
from scripts.plan.term import Term, number, present

Case = Literal["low", "likely", "high"]
PASSES = 3
"Forward, the same again from the checkpoints, and backward, which makes no gradient of a frozen weight."
ROW_VALUES = (23, 46)
"Values that one route moves through memory in three passes of our expert function: x hidden, and x expert width."


@dataclass(frozen=True)
class Guess:
    """What the low, likely and high cases assume."""

    efficiency: float
    "Share of the attainable FLOP rate."
    gathers: float
    "Times the weights cross the bus per micro-step: forward, recomputation and backward make 2 to 3."
    hidden: bool
    "Whether gathering overlaps with computing."
    padding: float
    "How far the padded length of a batch goes from the mean towards the longest example."
    launching: float
    "Factor on the fixed cost per layer: Python, kernel launches and DeepSpeed's hooks vary most of all."
    ahead: bool
    "Whether launches run ahead of the GPU where no gather waits between layers: then only what sticks out counts."
    start: float
    "Factor on the offer's start_minutes."
    read: float
    "Factor on reading times: a network volume gives 200-400 MB/s."


GUESSES: dict[Case, Guess] = {
    "low": Guess(0.5, 2.0, True, 0.0, 0.5, True, 0.5, 0.75),
    "likely": Guess(0.35, 2.33, False, 0.5, 1.0, True, 1.0, 1.0),
    "high": Guess(0.15, 3.0, False, 1.0, 4.0, False, 2.5, 1.5),
}
"2.33 gathers: counted on a tiny model with checkpointing on two ranks."


@dataclass(frozen=True)
class Pass:
    """One micro-batch of one GPU: padded tokens, the mean length of an example, the share of tokens that carry loss."""

    tokens: float
    mean: float
    supervised: float


def flop_per_token(shape: Shape, trained: tuple[Matrix, ...], rank: int, mean: float, supervised: float) -> float:
    """One forward pass: 2 per active weight, the head at supervised positions, attention over half the context.

    Gated DeltaNet costs about 10 x heads x key width x value width per token and layer besides its projections.
    """
    linear = sum(2 * m.inputs * m.outputs * m.active for group in matrices(shape).values() for m in group)
    lora = sum(2 * rank * (m.inputs + m.outputs) * m.active for m in trained)
    head = 2 * shape.vocabulary * shape.hidden * supervised
    attention = 4 * shape.heads * shape.head_dim * mean / 2 * shape.attention_layers
    delta = 0.0
    if gdn := shape.linear_attention:
        delta = 10.0 * gdn.value_heads * gdn.key_head_dim * gdn.value_head_dim * gdn.layers
    return linear + lora + head + attention + delta


def pass_terms(
    shape: Shape,
    trained: tuple[Matrix, ...],
    rank: int,
    storage: Storage,
    batch: Pass,
    gpu: Gpu,
    guess: Guess,
) -> tuple[Term, ...]:
    """Seconds of one forward and backward pass of one micro-batch on every GPU, by what they are spent on."""
    forward = flop_per_token(shape, trained, rank, batch.mean, batch.supervised)
    rate = guess.efficiency * gpu.bf16_tflops * 1e12
    computing = Term(
        "computing",
        PASSES * batch.tokens * forward / rate,
        f"{PASSES} x {batch.tokens:,.0f} tokens x {forward / 1e9:.3g} GFLOP at {guess.efficiency:.0%} of "
        f"{gpu.bf16_tflops:g} TFLOP/s",
    )
    gathering = _gathering(shape, storage, gpu, guess)
    if guess.hidden:  # under the products: only what sticks out counts
        exposed = max(0.0, gathering.size - computing.size)
        gathering = Term(gathering.name, exposed, gathering.says + ", less what computing hides")
    moved = [
        _per_second(name, size, says, gpu)
        for name, size, says in (
            _weights_read(shape, storage, guess),
            _dequantised(shape, storage),
            _activations(shape, storage, batch.tokens),
        )
    ]
    busy = computing.size + sum(term.size for term in moved)
    return present((computing, *moved, gathering, _launching(shape, storage, busy, gpu, guess)))


def update_terms(parameters: int, storage: Storage, ranks: int, gpu: Gpu) -> tuple[Term, ...]:
    """Seconds that an optimizer step adds to its passes: gradients exchanged, adapter and its states rewritten."""
    exchanged = 2 * parameters * storage.gradient_bytes if ranks > 1 else 0.0
    share = parameters / ranks if storage.partitioned else parameters
    rewritten = 2 * share * storage.state_bytes
    return present(
        (
            Term(
                "exchanging gradients",
                exchanged / (gpu.bus_gb_per_second * 1e9),
                f"2 x {number(parameters)} values x {storage.gradient_bytes:g} bytes at {gpu.bus_gb_per_second:g} GB/s",
            ),
            _per_second("updating", rewritten, f"2 x {number(share)} values x {storage.state_bytes:g} bytes", gpu),
        )
    )


def _launching(shape: Shape, storage: Storage, busy: float, gpu: Gpu, guess: Guess) -> Term:
    """Kernel launches do not wait for the GPU; gathers do, and so does a CPU."""
    seconds = shape.layers * gpu.layer_seconds * guess.launching
    says = f"{shape.layers} layers x {gpu.layer_seconds * guess.launching:g} s"
    if not guess.ahead or storage.partitioned or gpu.device == "cpu":
        return Term("launching", seconds, says)
    return Term("launching", max(0.0, seconds - busy), f"{says}, less {busy:.3g} s in which the GPU is busy")


def _gathering(shape: Shape, storage: Storage, gpu: Gpu, guess: Guess) -> Term:
    if not storage.partitioned or storage.ranks == 1:
        return Term("gathering weights", 0, "")
    crossing = frozen_term(shape, storage).size * (storage.ranks - 1)  # a rank holds 1/N and receives the rest
    says = f"{guess.gathers:g} x {crossing / 1e9:.1f} GB at {gpu.bus_gb_per_second:g} GB/s of bus"
    return Term("gathering weights", guess.gathers * crossing / (gpu.bus_gb_per_second * 1e9), says)


def _weights_read(shape: Shape, storage: Storage, guess: Guess) -> tuple[str, float, str]:
    """Three passes read them; what is gathered is also written."""
    stored = frozen_term(shape, storage).size * (storage.ranks if storage.partitioned else 1)
    times = PASSES + (guess.gathers if storage.partitioned else 0)
    return "reading weights", times * stored, f"{times:g} x {stored / 1e9:.1f} GB"


def _dequantised(shape: Shape, storage: Storage) -> tuple[str, float, str]:
    """In each pass every large matrix is written and read again in the values' precision."""
    if not storage.quantize:
        return "dequantising", 0.0, ""
    large = sum(m.parameters for group in matrices(shape).values() for m in group)
    says = f"{PASSES} x {number(large)} weights x {storage.value_bytes} bytes, written and read"
    return "dequantising", 2.0 * PASSES * large * storage.value_bytes, says


def _activations(shape: Shape, storage: Storage, tokens: float) -> tuple[str, float, str]:
    """Rows of the experts through memory; a dense layer's products are few and large, and bound by computing."""
    if not shape.experts or storage.experts != "lean":
        return "moving activations", 0.0, ""
    values = ROW_VALUES[0] * shape.hidden + ROW_VALUES[1] * shape.expert_intermediate
    per_token = shape.expert_layers * shape.experts_per_token * values * storage.value_bytes
    says = (
        f"{tokens:,.0f} tokens x {shape.expert_layers} layers x {shape.experts_per_token} routes x {values:,} values x "
        f"{storage.value_bytes} bytes"
    )
    return "moving activations", tokens * per_token, says


def _per_second(name: str, size: float, says: str, gpu: Gpu) -> Term:
    return Term(name, size / (gpu.hbm_gb_per_second * 1e9), f"{says} at {gpu.hbm_gb_per_second:,g} GB/s")
