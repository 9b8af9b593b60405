"""The arithmetic of a plan in plain words, at most 100 columns wide: every term with its formula and its numbers.

print(explain_text(plan, load_recipe(plan.recipe), None, load_catalog()))
"""

from __future__ import annotations

import textwrap

from recipes.catalog import Catalog
from recipes.load import LoadedRecipe
from recipes.preparation import OfferPlan, Plan, Span, TrainingSetReport
from recipes.recipe import EngineName
from scripts.plan.choose import cheapest, judge_all
from scripts.plan.estimate import Estimate, as_planned, estimate
from scripts.plan.parameters import targeted
from scripts.plan.step import GUESSES
from scripts.plan.storage import Quantised
from scripts.plan.term import GIB, Term, number
from scripts.plan.text import WIDTH
from scripts.plan.workload import workload_of

_INDENT = " " * 41


def explain_text(plan: Plan, loaded: LoadedRecipe, report: TrainingSetReport | None, catalog: Catalog) -> str:
    """What `lorry plan --explain` adds: the chosen offer, or without one the cheapest, term by term."""
    offer = next((o for o in plan.offers if o.offer == plan.chosen), None) or min(plan.offers, key=_usd)
    recipe, model = as_planned(loaded.recipe, offer.optimizer), catalog.models[plan.model]
    found = estimate(recipe, model, workload_of(recipe, report), catalog.offers[offer.offer], catalog)
    blocks = [
        f"The arithmetic of {offer.offer} with optimizer {offer.optimizer}"
        + (f", which cannot be used: {offer.reason}" if offer.reason else ""),
        _trained(loaded, catalog),
        _section("GiB per GPU", [*_lines(found.memory, GIB, ".2f"), _total(offer.total_gib, ".2f", "the peak")]),
        _section("Seconds of an optimizer step, likely", _step(found, offer)),
        _section("Reading the weights, seconds", _lines((found.times.load,), 1, ".1f")),
        _section("Hours and dollars", [_wrapped(line) for line in _money(found, offer, plan.nodes)]),
        _section("The other engine", [_wrapped(_other_engine(loaded, report, catalog))]),
        _section("What low, likely and high assume", [_wrapped(line) for line in _cases()]),
    ]
    return "\n\n".join(blocks) + "\n"


def _trained(loaded: LoadedRecipe, catalog: Catalog) -> str:
    adapter, model = loaded.recipe.adapter, catalog.models[loaded.recipe.base.id]
    lines = []
    for m in targeted(model.shape, catalog.families[model.family], adapter):
        layers = m.copies // m.per_layer
        inputs = f"{m.inputs:,}" + (f" x {m.per_layer}" if m.per_layer > 1 and m.shared != "inputs" else "")
        outputs = f"{m.outputs:,}" + (f" x {m.per_layer}" if m.per_layer > 1 and m.shared != "outputs" else "")
        says = f"rank {adapter.rank} x ({inputs} + {outputs}) x {layers} layers"
        lines.append(_line(m.name.removeprefix("mlp.").removesuffix(".weight"), number(m.lora(adapter.rank)), says))
    return _section("Trained parameters", lines)


def _step(found: Estimate, offer: OfferPlan) -> list[str]:
    assert offer.step_seconds is not None
    return [*_lines(found.times.step_terms, 1, ".3f"), _total(offer.step_seconds.likely, ".3f", "one step")]


def _money(found: Estimate, offer: OfferPlan, nodes: int) -> list[str]:
    assert offer.hours is not None
    assert offer.usd is not None
    usd_per_hour = found.offer.usd_per_hour * nodes
    minutes = " + ".join(f"{span.likely:.1f} to {stage}" for stage, span in offer.minutes.items())
    return [
        f"likely {minutes} = {sum(s.likely for s in offer.minutes.values()):.1f} minutes",
        f"{offer.hours.likely:.2f} hours x ${usd_per_hour:.2f} = ${offer.usd.likely:.2f}; "
        f"the high case {_high(offer.hours)} x ${usd_per_hour:.2f} = ${offer.usd.high:.2f}",
    ]


def _other_engine(loaded: LoadedRecipe, report: TrainingSetReport | None, catalog: Catalog) -> str:
    """What the cheapest offer would cost if the recipe named the other engine."""
    recipe, model = loaded.recipe, catalog.models[loaded.recipe.base.id]
    engine: EngineName = "replica" if recipe.hardware.engine == "zero3" else "zero3"
    family = catalog.families[model.family]
    if engine == "replica" and family.moe_block and not family.our_experts:
        return "engine replica cannot hold this model: its experts cannot be quantised here"
    quantize: Quantised | None = "int8" if engine == "replica" else None
    hardware = recipe.hardware.model_copy(update={"engine": engine, "quantize": quantize, "gpus": None, "gpu": None})
    other = recipe.model_copy(update={"hardware": hardware})
    best = cheapest(judge_all(other, model, workload_of(other, report), catalog))
    name = f"engine {engine}" + (f" with quantize {quantize}" if quantize else "")
    if best is None:
        return f"{name} fits no offer that this recipe allows"
    assert best.hours is not None
    assert best.usd is not None
    return f"{name} would take {best.offer}: likely {best.hours.likely:.2f} hours and ${best.usd.likely:.2f}"


def _cases() -> list[str]:
    return [
        f"{name}: {g.efficiency:.0%} of the attainable FLOP rate; {g.gathers:g} gathers of the weights"
        f"{', hidden behind the products' if g.hidden else ''}; launch cost x {g.launching:g}; start x {g.start:g}; "
        f"reading x {g.read:g}"
        for name, g in GUESSES.items()
    ]


def _lines(terms: tuple[Term, ...], unit: float, form: str) -> list[str]:
    return [_line(term.name, f"{term.size / unit:{form}}", term.says) for term in terms]


def _line(name: str, value: str, says: str) -> str:
    head = f"  {name:<24}{value:>13}  "
    return textwrap.fill(says, WIDTH, initial_indent=head, subsequent_indent=_INDENT)


def _wrapped(line: str) -> str:
    return textwrap.fill(line, WIDTH, initial_indent="  ", subsequent_indent="    ")


def _total(value: float, form: str, says: str) -> str:
    return _line("=", f"{value:{form}}", says)


def _section(title: str, lines: list[str]) -> str:
    return "\n".join([title, *lines])


def _high(span: Span) -> str:
    return f"{span.high:.2f} hours"


def _usd(offer: OfferPlan) -> float:
    assert offer.usd is not None
    return offer.usd.likely
