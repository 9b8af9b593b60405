"""The optimisation: steps, evaluation, and what is proven about the first two steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers.modeling_layers import GradientCheckpointingLayer

from recipes.job import LaunchSpec, Metric
from recipes.schedule import batch_of_step, epoch_of_step, learning_rate_of_step
from trainer.batches import Layout, passes, share, token_count, trained_count
from trainer.data import Example
from trainer.engine import Engine
from trainer.environment import Place, StopRequest
from trainer.failures import TrainingStopped
from trainer.first_steps import STEPS, Pace, hold_to_account
from trainer.journal import Journal
from trainer.targets import is_b


@dataclass
class Run:
    """What the steps work on."""

    spec: LaunchSpec
    place: Place
    journal: Journal
    engine: Engine
    train: Sequence[Example]
    layout: Layout
    stop: StopRequest


def evaluate(model: Any, examples: Sequence[Example], layout: Layout, place: Place) -> float:
    """Mean loss per trained token over the examples. Collective."""
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=place.device)
    with torch.no_grad():
        for groups in passes(examples, layout, place.world):
            mine, counts = share(groups, place.rank)
            nll = model(**layout.tensors(mine, place.device))
            if counts:
                total += torch.stack([nll.double(), nll.new_tensor(trained_count(mine), dtype=torch.float64)])
    dist.all_reduce(total)
    model.train()
    return float(total[0] / total[1])


def train(run: Run, first_step: int, save: Callable[[int], None]) -> bool:
    """Steps from `first_step` (from 0) to the end; False when SIGTERM ended it earlier, after a checkpoint.

    `save(step)` is collective. Raises TrainingStopped (nan_loss, bad_targets, too_slow, out_of_memory).
    """
    spec, journal = run.spec, run.journal
    saved_at, saved_step = time.monotonic(), first_step
    pace = Pace(token_count(run.train) / len(run.train) * spec.recipe.training.global_batch)
    if _agreed(run, run.stop.asked)[0]:
        return False
    for step in range(first_step, spec.total_steps):
        started = time.monotonic()
        examples = [run.train[i] for i in _indices(run, step)]
        with _recomputing(run.engine.model) if step == first_step else nullcontext():
            nll, rate, norm = _step(run, step, examples, rehearse=step == first_step)
        due = time.monotonic() - saved_at > spec.recipe.training.checkpoint_minutes * 60
        stop, save_now, loss = _agreed(run, run.stop.asked, due and run.place.rank == 0, nll)
        _refuse_nan(step + 1, loss, norm)
        _check_gradients(run, step + 1)
        seconds = time.monotonic() - started
        pace.add(seconds, token_count(examples))
        _record(run, step, loss, rate, norm, examples, seconds, pace)
        if pace.steps == STEPS:
            hold_to_account(spec, run.place, journal, pace, spec.total_steps - step - 1)
        every = spec.recipe.training.checkpoint_steps
        if step + 1 < spec.total_steps and (stop or save_now or (every and (step + 1) % every == 0)):
            journal.stage("saving")
            save(step + 1)
            journal.stage("training")
            saved_at, saved_step = time.monotonic(), step + 1
        if stop and saved_step == step + 1:
            return False
    return True


def _indices(run: Run, step: int) -> list[int]:
    training = run.spec.recipe.training
    return batch_of_step(step, len(run.train), training.global_batch, training.seed)


def _step(run: Run, step: int, examples: Sequence[Example], rehearse: bool) -> tuple[Any, float, float]:
    """One optimizer step; (this rank's share of the mean loss, the learning rate, the gradient norm).

    The loss is divided by the trained tokens of the whole global batch: 1, 2 or 3 ranks then take the same step.
    `rehearse` adds a pass of the largest micro-batch of the set, which counts nothing and shows the peak of memory.
    """
    training, place = run.spec.recipe.training, run.place
    rate = learning_rate_of_step(
        step, run.spec.total_steps, training.learning_rate, training.schedule, training.warmup_fraction
    )
    tokens = trained_count(examples)
    mean = 0.0
    planned = [share(groups, place.rank) for groups in passes(examples, run.layout, place.world)]
    if rehearse:
        planned.append((run.layout.largest(run.train), False))
    run.engine.begin(rate, len(planned))
    for mine, counts in planned:
        loss = run.engine.model(**run.layout.tensors(mine, place.device)) * (float(counts) / tokens)
        run.engine.backward(loss)
        mean = mean + loss.detach().double()
    return mean, rate, run.engine.end()


def _agreed(run: Run, stop: bool, due: bool = False, nll: Any = 0.0) -> tuple[bool, bool, float]:
    """What all ranks act on together: did anyone get SIGTERM, is a checkpoint due by rank 0's clock, the mean loss."""
    said = torch.tensor([float(stop), float(due), float(nll)], dtype=torch.float64, device=run.place.device)
    dist.all_reduce(said)
    return bool(said[0] > 0), bool(said[1] > 0), float(said[2])


def _refuse_nan(step: int, loss: float, norm: float) -> None:
    for name, value in (("loss", loss), ("gradient norm", norm)):
        if not math.isfinite(value):
            raise TrainingStopped("nan_loss", f"the {name} of step {step} is {value}; lower training.learning_rate")


def _check_gradients(run: Run, step: int) -> None:
    """After step 1 every B has moved (A's gradient is zero while B is zero), after step 2 every A; all finite.

    Each matrix is looked at as a whole: an expert that got no token is no fault, a matrix without gradient is.
    """
    if step > 2:
        return

    names = [name for name in run.engine.trainable if is_b(name) == (step == 1)]
    flags = torch.zeros(2, len(names), device=run.place.device)
    for i, name in enumerate(names):
        weight, momentum = run.engine.part(name)
        flags[0, i] = float(momentum.count_nonzero() > 0)
        flags[1, i] = float(not torch.isfinite(weight).all())
    dist.all_reduce(flags)
    still = [name for name, moved in zip(names, flags[0].tolist(), strict=True) if not moved]
    if still:
        raise TrainingStopped("bad_targets", f"{still[0]} got no gradient by step {step} ({len(still)} such matrices)")
    if flags[1].any():
        raise TrainingStopped("nan_loss", f"an adapter matrix is not finite after step {step}")


def _record(
    run: Run,
    step: int,
    loss: float,
    rate: float,
    norm: float,
    examples: Sequence[Example],
    seconds: float,
    pace: Pace,
) -> None:
    journal, training = run.journal, run.spec.recipe.training
    if journal.known("first_training_loss") is None:
        journal.learn(first_training_loss=loss)
    trained = (journal.known("trained_tokens") or 0) + trained_count(examples)
    journal.learn(step=step + 1, final_training_loss=loss, trained_tokens=trained)
    journal.record(
        Metric(
            kind="train",
            at=time.time(),
            attempt=journal.attempt,
            epoch=epoch_of_step(step, len(run.train), training.global_batch) + 1,
            step=step + 1,
            training_loss=loss,
            learning_rate=rate,
            gradient_norm=norm,
            tokens_per_second=token_count(examples) / seconds,
            step_seconds=pace.step_seconds,
        )
    )


@contextmanager
def _recomputing(model: Any) -> Iterator[None]:
    """Proves that layers are recomputed in backward: in eval mode gradient checkpointing is silently off."""
    calls: list[str] = []
    layer = next(m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))
    hooks = [
        next(layer.children()).register_forward_pre_hook(lambda module, arguments: calls.append("layer")),
        model.register_forward_pre_hook(lambda module, arguments: calls.append("pass")),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if calls.count("layer") < 2 * calls.count("pass"):
        raise TrainingStopped("unexpected", "gradient checkpointing is off: layers are not recomputed in backward")
