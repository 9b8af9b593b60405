"""Minutes by stage and dollars, as low, likely and high: arithmetic on rates that were not measured by us."""

from __future__ import annotations

import math
from dataclasses import dataclass

from recipes.catalog import BaseModelFacts, Gpu, Offer
from recipes.preparation import Span
from recipes.recipe import Recipe
from scripts.plan.memory import frozen_term
from scripts.plan.parameters import Matrix
from scripts.plan.step import GUESSES, Case, Guess, Pass, pass_terms, update_terms
from scripts.plan.storage import Storage
from scripts.plan.term import Term
from scripts.plan.workload import Workload

MINUTES = 60.0
PROCESS_MINUTES = 0.4
"Starting Python, importing torch and joining the ranks."
EVALUATIONS = 2
"The held-out conversations, before and after."
FORWARD_SHARE = 0.4
"Of a training micro-step that an evaluation micro-step takes."
PACKED = 0.9
"Share of a token budget that packed conversations fill: more with short ones, less with few."
UPLOAD_GB_PER_SECOND = 0.1
"To the store; an assumption."


@dataclass(frozen=True)
class Times:
    """Seconds of an optimizer step and its likely terms, minutes by stage, hours and dollars in total."""

    step_seconds: Span
    step_terms: tuple[Term, ...]
    read_gb: float
    load: Term
    minutes: dict[str, Span]
    hours: Span
    usd: Span


@dataclass(frozen=True)
class _Run:
    """What every estimate of one run on one offer looks at."""

    model: BaseModelFacts
    trained: tuple[Matrix, ...]
    recipe: Recipe
    storage: Storage
    work: Workload
    offer: Offer
    gpu: Gpu

    @property
    def ranks(self) -> int:
        return self.offer.gpus * self.recipe.hardware.nodes

    @property
    def passes(self) -> int:
        """Forward passes per GPU and optimizer step."""
        train = self.recipe.training
        if train.micro_tokens is None:
            return math.ceil(train.global_batch / (train.micro_batch * self.ranks))
        return math.ceil(train.global_batch * self.work.mean / (PACKED * train.micro_tokens * self.ranks))

    def tokens(self, padding: float) -> float:
        """Tokens of one pass of one GPU, padding counted; packed ones have none."""
        train, storage = self.recipe.training, self.storage
        if train.micro_tokens is not None:
            share = train.global_batch * self.work.mean / (self.passes * self.ranks)
            return max(share, self.work.mean)
        waiting = train.micro_batch * (storage.ranks if storage.partitioned else 1)
        return train.micro_batch * padded(self.work, waiting, padding)

    @property
    def parameters(self) -> int:
        return sum(matrix.lora(self.recipe.adapter.rank) for matrix in self.trained)


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
    run = _Run(model, trained, recipe, storage, work, offer, gpu)
    terms = {case: _micro_terms(run, guess) for case, guess in GUESSES.items()}
    update = update_terms(run.parameters, storage, run.ranks, gpu)
    micro = {case: sum(term.size for term in found) for case, found in terms.items()}
    steps: dict[Case, float] = {case: run.passes * micro[case] + sum(t.size for t in update) for case in GUESSES}
    cases = {case: _stages(run, guess, steps[case], micro[case]) for case, guess in GUESSES.items()}
    minutes = {stage: Span(**{case: round(cases[case][stage], 2) for case in GUESSES}) for stage in cases["likely"]}
    hours = {case: sum(getattr(span, case) for span in minutes.values()) / MINUTES for case in GUESSES}
    return Times(
        step_seconds=Span(**{case: round(steps[case], 3) for case in GUESSES}),
        step_terms=(*_times_passes(terms["likely"], run.passes), *update),
        read_gb=read_gb(model, storage),
        load=_load_term(run),
        minutes=minutes,
        hours=Span(**{case: round(hours[case], 3) for case in GUESSES}),
        usd=Span(**{case: round(hours[case] * offer.usd_per_hour * recipe.hardware.nodes, 2) for case in GUESSES}),
    )


def read_gb(model: BaseModelFacts, storage: Storage) -> float:
    """GB that a launch reads: the published checkpoint, or the staged quantised model, which is as large as in memory.

    The 80B: 163 GB from the Hub; 81.6 staged as int8 (0.50 of it), 42.1 as nf4 (0.26).
    """
    return frozen_term(model.shape, storage).size / 1e9 if storage.quantize else model.checkpoint_gb


def _load_term(run: _Run) -> Term:
    """Seconds of reading the weights and starting the processes."""
    size, speed = read_gb(run.model, run.storage), run.offer.storage_gb_per_second
    staged = f"staged as {run.storage.quantize}" if run.storage.quantize else "as published"
    says = f"{size:.1f} GB {staged} at {speed:g} GB/s, and {PROCESS_MINUTES:g} minutes to start Python"
    return Term("load", size / speed + PROCESS_MINUTES * MINUTES, says)


def padded(work: Workload, batch: int, share: float) -> float:
    """Expected length of the longest of `batch` examples, which all the others wait for."""
    return work.mean + (work.longest - work.mean) * (1 - 1 / batch) * share if work.longest > work.mean else work.mean


def _micro_terms(run: _Run, guess: Guess) -> tuple[Term, ...]:
    batch = Pass(run.tokens(guess.padding), run.work.mean, run.work.supervised)
    return pass_terms(run.model.shape, run.trained, run.recipe.adapter.rank, run.storage, batch, run.gpu, guess)


def _times_passes(terms: tuple[Term, ...], passes: int) -> tuple[Term, ...]:
    """The terms of all passes of one optimizer step."""
    before = f"{passes} passes x " if passes > 1 else ""
    return tuple(Term(term.name, passes * term.size, before + term.says) for term in terms)


def _stages(run: _Run, guess: Guess, step: float, micro: float) -> dict[str, float]:
    """Minutes by stage, of runs whose steps and passes take so many seconds."""
    load = guess.read * read_gb(run.model, run.storage) / run.offer.storage_gb_per_second / MINUTES + PROCESS_MINUTES
    rounds = math.ceil(run.work.valid_examples / run.recipe.training.global_batch * run.passes)
    adapter_gb = run.parameters * 4 / 1e9
    return {
        "start": run.offer.start_minutes * guess.start,
        "load": load,
        "evaluate": EVALUATIONS * rounds * micro * FORWARD_SHARE / MINUTES,
        "train": run.work.steps * step / MINUTES,
        "prove": load,  # a fresh process reads the base model again
        "upload": guess.read * adapter_gb / UPLOAD_GB_PER_SECOND / MINUTES + 0.1,
    }
