"""Minutes by stage and dollars, as low, likely and high: arithmetic on rates that were not measured by us.

step = accumulation x (FLOP / attainable rate + bytes / memory rate + exposed gather + layers x launch cost)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from recipes.catalog import BaseModelFacts, Gpu, Offer, Shape
from recipes.preparation import Span
from recipes.recipe import Recipe
from scripts.plan.memory import Storage, frozen_bytes
from scripts.plan.parameters import Matrix, matrices
from scripts.plan.workload import Workload

MINUTES = 60.0
Case = Literal["low", "likely", "high"]


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
    start: float
    "Factor on the offer's start_minutes."
    read: float
    "Factor on reading times: a network volume gives 200-400 MB/s."


GUESSES: dict[Case, Guess] = {
    "low": Guess(0.5, 2.0, True, 0.0, 0.5, 0.5, 0.75),
    "likely": Guess(0.35, 2.33, False, 0.5, 1.0, 1.0, 1.0),
    "high": Guess(0.15, 3.0, False, 1.0, 4.0, 2.5, 1.5),
}
"2.33 gathers: counted on a tiny model with checkpointing on two ranks."

PROCESS_MINUTES = 0.4
"Starting Python, importing torch and joining the ranks."
EVALUATIONS = 2
"The held-out conversations, before and after."
FORWARD_SHARE = 0.4
"Of a training micro-step that an evaluation micro-step takes."
UPLOAD_GB_PER_SECOND = 0.1
"To the store; an assumption."


@dataclass(frozen=True)
class Times:
    """Seconds of an optimizer step, minutes by stage, hours and dollars in total."""

    step_seconds: Span
    minutes: dict[str, Span]
    hours: Span
    usd: Span


def times(
    model: BaseModelFacts,
    trained: tuple[Matrix, ...],
    recipe: Recipe,
    storage: Storage,
    work: Workload,
    offer: Offer,
    gpu: Gpu,
) -> Times:
    """How long the run takes on this offer and what it costs, from image pull to upload."""
    cases: dict[Case, dict[str, float]] = {}
    steps: dict[Case, float] = {}
    for case, guess in GUESSES.items():
        steps[case], cases[case] = _stages(model, trained, recipe, storage, work, offer, gpu, guess)
    minutes = {stage: Span(**{case: round(cases[case][stage], 2) for case in GUESSES}) for stage in cases["likely"]}
    hours = {case: sum(getattr(span, case) for span in minutes.values()) / MINUTES for case in GUESSES}
    return Times(
        step_seconds=Span(**{case: round(steps[case], 3) for case in GUESSES}),
        minutes=minutes,
        hours=Span(**{case: round(hours[case], 3) for case in GUESSES}),
        usd=Span(**{case: round(hours[case] * offer.usd_per_hour, 2) for case in GUESSES}),
    )


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


def micro_step_seconds(
    shape: Shape,
    trained: tuple[Matrix, ...],
    recipe: Recipe,
    storage: Storage,
    work: Workload,
    gpu: Gpu,
    guess: Guess,
) -> float:
    """One forward and backward pass of one micro-batch on every GPU."""
    rank, micro = recipe.adapter.rank, recipe.training.micro_batch
    tokens = micro * padded(work, micro * (storage.ranks if storage.partitioned else 1), guess.padding)
    forward = flop_per_token(shape, trained, rank, work.mean, work.supervised)
    folded = 0.0
    if storage.experts == "fold":  # a fold's backward also makes the gradient of the whole weight
        folded = sum(2 * m.inputs * m.outputs * m.active for m in trained if m.parametrised)
    compute = tokens * (3 * forward + folded) / (guess.efficiency * gpu.bf16_tflops * 1e12)
    gather = 0.0
    if storage.partitioned and storage.ranks > 1:
        crossing = frozen_bytes(shape, storage) * (storage.ranks - 1) / storage.ranks
        gather = guess.gathers * crossing / (gpu.bus_gb_per_second * 1e9)
    memory = _moved_bytes(shape, trained, storage, guess) / (gpu.hbm_gb_per_second * 1e9)
    busy = max(compute, gather) if guess.hidden else compute + gather
    return busy + memory + shape.layers * gpu.layer_seconds * guess.launching


def padded(work: Workload, batch: int, share: float) -> float:
    """Expected length of the longest of `batch` examples, which all the others wait for."""
    return work.mean + (work.longest - work.mean) * (1 - 1 / batch) * share if work.longest > work.mean else work.mean


def _moved_bytes(shape: Shape, trained: tuple[Matrix, ...], storage: Storage, guess: Guess) -> float:
    """Weights through GPU memory per micro-step: three passes read them; copies are written and read again."""
    stored = frozen_bytes(shape, storage)
    moved = 3.0 * stored
    if storage.partitioned:
        moved += guess.gathers * stored
    large = sum(m.parameters for group in matrices(shape).values() for m in group)
    if storage.quantised:  # dequantised in each pass: written and read in bf16
        moved += 3 * 2 * large * storage.value_bytes
    if storage.experts == "fold":  # two folds (read, write) and the weight gradient (write, read twice)
        moved += 7.0 * storage.value_bytes * sum(m.parameters for m in trained if m.parametrised)
    return moved


def _stages(
    model: BaseModelFacts,
    trained: tuple[Matrix, ...],
    recipe: Recipe,
    storage: Storage,
    work: Workload,
    offer: Offer,
    gpu: Gpu,
    guess: Guess,
) -> tuple[float, dict[str, float]]:
    """Seconds of one optimizer step, and minutes by stage."""
    train, ranks = recipe.training, offer.gpus * recipe.hardware.nodes
    micro = micro_step_seconds(model.shape, trained, recipe, storage, work, gpu, guess)
    parameters = sum(m.lora(recipe.adapter.rank) for m in trained)
    exchange = 2 * parameters * storage.gradient_bytes / (gpu.bus_gb_per_second * 1e9) if ranks > 1 else 0.0
    step = math.ceil(train.global_batch / (train.micro_batch * ranks)) * micro + exchange
    load = guess.read * model.checkpoint_gb / offer.storage_gb_per_second / MINUTES + PROCESS_MINUTES
    rounds = math.ceil(work.valid_examples / (train.micro_batch * ranks))
    adapter_gb = parameters * 4 / 1e9
    stages = {
        "start": offer.start_minutes * guess.start,
        "load": load,
        "evaluate": EVALUATIONS * rounds * micro * FORWARD_SHARE / MINUTES,
        "train": work.steps * step / MINUTES,
        "prove": load,  # a fresh process reads the base model again
        "upload": guess.read * adapter_gb / UPLOAD_GB_PER_SECOND / MINUTES + 0.1,
    }
    return step, stages
