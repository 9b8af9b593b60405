"""A plan in plain words, at most 100 columns wide: the chosen offer by part and stage, then every other offer.

print(plan_text(plan, load_catalog()))
"""

from __future__ import annotations

import math
import textwrap

from recipes.catalog import Catalog, Offer
from recipes.preparation import OfferPlan, Plan, Span

WIDTH = 100
SMALLEST_SHOWN = 0.005
"GiB or seconds that round to something."


def plan_text(plan: Plan, catalog: Catalog) -> str:
    """What `lorry plan` prints."""
    chosen = next((offer for offer in plan.offers if offer.offer == plan.chosen), None)
    others = sorted((offer for offer in plan.offers if offer is not chosen), key=_usable_and_cheap_first)
    choice = _chosen(chosen, plan.nodes, catalog) if chosen else "Chosen: none. Every offer is listed below."
    blocks = [_head(plan), choice]
    title = f"{'Other offers' if chosen else 'Offers'}, at prices of {plan.prices_of} or later"
    blocks.append("\n".join([title, _HEADING, *(_line(offer, plan.nodes, catalog) for offer in others)]))
    if plan.notes:
        blocks.append("\n".join(["Notes", *(_bullet(note) for note in plan.notes)]))
    return "\n\n".join(blocks) + "\n"


def _head(plan: Plan) -> str:
    counted = "counted" if plan.tokens_exact else "estimated"
    return "\n".join(
        (
            f"{plan.recipe}: LoRA on {plan.model}",
            f"{plan.trainable_parameters:,} trained parameters",
            f"{plan.examples:,} training examples, {plan.train_tokens:,} tokens ({counted}), "
            f"the longest {plan.longest_tokens:,}",
            f"{plan.steps:,} optimizer steps, {plan.steps_per_epoch:,} per epoch",
        )
    )


def _chosen(offer: OfferPlan, nodes: int, catalog: Catalog) -> str:
    facts = catalog.offers[offer.offer]
    several = f"{nodes} nodes of " if nodes > 1 else ""
    return "\n".join(
        (
            f"Chosen: {offer.offer}, {several}{facts.gpus} x {facts.gpu} on {offer.backend} ({facts.provider_type})",
            f"  {_price(facts, nodes)}; {_summary(offer)}",
            *(["  with optimizer adamw_8bit"] if offer.optimizer == "adamw_8bit" else []),
            "",
            *_memory_table(offer),
            "",
            *_time_table(offer),
            "",
            *_step_table(offer),
        )
    )


def _summary(offer: OfferPlan) -> str:
    assert offer.hours is not None
    assert offer.usd is not None
    hours = offer.hours.likely
    likely = f"likely {hours:.1f} hours" if hours >= 2 else f"likely {math.ceil(hours * 60)} minutes"
    if not offer.usd.high:
        return likely
    return f"{likely} and ${offer.usd.likely:.2f}, at most ${offer.usd.high:.2f}"


def _memory_table(offer: OfferPlan) -> list[str]:
    lines = ["  GiB per GPU"]
    lines += [f"  {part:<24}{size:>9.2f}" for part, size in offer.gib.items() if abs(size) >= SMALLEST_SHOWN]
    total = f"  {'total':<24}{offer.total_gib:>9.2f}  of {offer.capacity_gib:g}"
    return [*lines, f"  {'-' * 33}", total]


def _time_table(offer: OfferPlan) -> list[str]:
    rows = [("seconds per step", offer.step_seconds, ".1f")]
    rows += [(f"minutes to {stage}", span, ".1f") for stage, span in offer.minutes.items()]
    rows += [("hours", offer.hours, ".2f"), ("dollars", offer.usd, ".2f")]
    head = f"  {'':<24}{'low':>9}{'likely':>9}{'high':>9}"
    return [head, *(_span_line(name, span, form) for name, span, form in rows if span)]


def _step_table(offer: OfferPlan) -> list[str]:
    """Where the likely step's seconds go."""
    shown = {name: seconds for name, seconds in offer.step_terms.items() if seconds >= SMALLEST_SHOWN}
    lines = ["  seconds of a likely step"]
    return [*lines, *(f"  {name:<24}{seconds:>9.2f}" for name, seconds in shown.items())]


def _span_line(name: str, span: Span, form: str) -> str:
    return f"  {name:<24}{span.low:>9{form}}{span.likely:>9{form}}{span.high:>9{form}}"


_HEADING = f"  {'':<26}{'$/h':>7}{'hours':>7}{'dollars':>9}  why not"


def _line(offer: OfferPlan, nodes: int, catalog: Catalog) -> str:
    assert offer.hours is not None
    assert offer.usd is not None
    price = catalog.offers[offer.offer].usd_per_hour * nodes
    figures = f"{price:>7.2f}{offer.hours.likely:>7.2f}{offer.usd.likely:>9.2f}"
    return f"  {offer.offer:<26}{figures}  {offer.reason or _costs_more(offer)}"


def _costs_more(offer: OfferPlan) -> str:
    small = " with optimizer adamw_8bit" if offer.optimizer == "adamw_8bit" else ""
    return f"fits{small}, but costs more"


def _bullet(note: str) -> str:
    return textwrap.fill(note, WIDTH, initial_indent="  - ", subsequent_indent="    ")


def _price(offer: Offer, nodes: int) -> str:
    return f"${offer.usd_per_hour * nodes:.2f} an hour as of {offer.date}" if offer.usd_per_hour else "free"


def _usable_and_cheap_first(offer: OfferPlan) -> tuple[bool, float, str]:
    assert offer.usd is not None
    return not offer.fits, offer.usd.likely, offer.offer
