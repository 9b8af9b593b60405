"""What is known before anything is launched: the report on the training set, and the plan with its price."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from recipes.job import Record
from recipes.recipe import BackendName, Optimizer


class Skipped(Record):
    """Rows left out for one reason; at most the first 20 line numbers are kept."""

    reason: str
    count: int
    lines: tuple[int, ...] = ()


class TokenCounts(Record):
    """Tokens of the canonical set. `exact` is False when no tokenizer was at hand: then 1.35 tokens per word."""

    exact: bool
    tokenizer: str
    train: int
    valid: int
    trained: int
    "Tokens of the train split that carry loss."
    longest: int
    longest_id: str


class TrainingSetReport(Record):
    """data/report.json: what of the training set is used, and why the rest is not."""

    format: Literal[1] = 1
    source: str
    source_sha256: str
    source_bytes: int
    form: str
    "Plain name of the form that was recognised."
    rows: int
    usable_rows: int
    skipped: tuple[Skipped, ...]
    conversations: int
    merged: int
    "Conversations whose pairs were merged into one example without loss."
    per_pair: int
    "Conversations kept as one example per pair, because merging would have changed the text."
    duplicates: int
    train_examples: int
    valid_examples: int
    train_sha256: str
    valid_sha256: str
    thoughts: int = 0
    "Examples with a trained answer that begins with a thought, <think>...</think>."
    tokens: TokenCounts
    notes: tuple[str, ...] = ()
    "Sentences a person should read."


class Span(Record):
    """Low, likely and high estimate of one quantity."""

    low: float
    likely: float
    high: float


class OfferPlan(Record):
    """How one offer would do: fits or not, why, GiB per GPU by part, hours and dollars."""

    offer: str
    backend: BackendName
    fits: bool
    reason: str
    "Why it does not fit or is not allowed; empty when it fits."
    optimizer: Optimizer = "adamw"
    "The recipe's; where it leaves it open, adamw_8bit on an offer that holds nothing larger."
    gib: dict[str, float]
    "GiB per GPU by part; the parts and their factor sum to total_gib."
    total_gib: float
    expected_peak_gib: float = 0.0
    "The share of total_gib that the trainer can measure: on a GPU what torch reserves, on a CPU the resident set."
    capacity_gib: float
    read_gb: float = 0.0
    "GB of weights that a launch reads."
    step_seconds: Span | None = None
    step_terms: dict[str, float] = Field(default_factory=dict)
    "Likely seconds of an optimizer step by what they are spent on."
    minutes: dict[str, Span] = Field(default_factory=dict)
    "By stage: start, load, evaluate, train, prove, upload."
    hours: Span | None = None
    usd: Span | None = None


class Plan(Record):
    """plan.json: what fits where, what it takes and costs, the choice, and why not the others."""

    format: Literal[1] = 1
    recipe: str
    recipe_sha256: str
    model: str
    trainable_parameters: int
    examples: int
    train_tokens: int
    longest_tokens: int
    tokens_exact: bool
    steps: int
    steps_per_epoch: int
    offers: tuple[OfferPlan, ...]
    nodes: int = 1
    "Of each offer; hours and dollars are those of all of them together."
    chosen: str | None
    "The offer: the cheapest that fits, is allowed by the recipe and stays under its limits."
    prices_of: str
    "Date of the oldest price used."
    notes: tuple[str, ...] = ()
