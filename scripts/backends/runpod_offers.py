"""Where a Pod may go now, best place first: the same GPU or a better one, at the quoted price or below. Pure.

choice = choose(spec, load_catalog(), runpod.gpus(count=spec.gpus), runpod.datacenters(), Limits())
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.catalog import Catalog, Offer
from recipes.job import LaunchSpec
from scripts.backends.base import LiveOffer
from scripts.backends.suitable import suitable
from scripts.errors import Problem, ProviderError, Refused

Json = Mapping[str, Any]
_LEVELS = ("HIGH", "MEDIUM", "LOW")
CENT = 0.005  # prices come as floats, so half a cent more is the same price


@dataclass(frozen=True)
class Limits:
    """datacenters: the only ones allowed, such as the home of a network volume; empty allows all.
    compliance: what a datacentre must hold, in the words of Runpod's catalogue."""

    datacenters: frozenset[str] = frozenset()
    compliance: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Candidate:
    """One place a Pod may be asked for. usd_per_hour: live, for the whole Pod."""

    offer: str
    gpu: str
    datacenter: str
    usd_per_hour: float
    stock: str


def choose(
    spec: LaunchSpec, catalog: Catalog, gpus: Sequence[Json], datacenters: Sequence[Json], limits: Limits
) -> list[Candidate]:
    """Candidates by price, then stock; the planned GPU goes before others at its price.

    gpus, datacenters: the live catalogue with stock for Pods of spec.gpus. Raises Refused when nothing that would do is
    rented at the quoted price, ProviderError when it is only out of stock, or out of stock where it is allowed.
    """
    planned = catalog.offers[spec.offer or ""]
    allowed = _allowed(datacenters, limits)
    rows = {str(row["id"]): row for row in gpus}
    found: list[Candidate] = []
    problems: dict[str, Problem] = {}
    for name, offer in suitable(spec, catalog):
        row = rows.get(offer.provider_type)
        problem = _unfit(name, offer, row, planned.usd_per_hour)
        if row is None or problem is not None:
            problems[name] = problem or _not_rented(name, offer)
            continue
        found += [Candidate(name, offer.provider_type, dc, _usd(row, offer), stock) for dc, stock in _stock(row)]
    here = [candidate for candidate in found if candidate.datacenter in allowed]
    if not here and not found and spec.offer in problems:
        raise Refused(problems[spec.offer])
    if not here:
        raise _nowhere(spec, planned, found, limits)
    return sorted(here, key=lambda c: (c.usd_per_hour, c.offer != spec.offer, _LEVELS.index(c.stock), c.datacenter))


def live_offers(catalog: Catalog, rows_of_count: Mapping[int, Sequence[Json]]) -> list[LiveOffer]:
    """Stock and price now of the Pod offers; rows_of_count: the live catalogue by number of GPUs."""
    found = []
    for name, offer in catalog.offers.items():
        row = next((r for r in rows_of_count.get(offer.gpus, ()) if r["id"] == offer.provider_type), None)
        if offer.backend == "runpod_pod" and row is not None:
            found.append(LiveOffer(name, bool(_stock(row)), _usd(row, offer)))
    return found


def _unfit(name: str, offer: Offer, row: Json | None, quoted: float) -> Problem | None:
    if row is None or not row.get("secure"):
        return _not_rented(name, offer)
    if row["maxCount"]["secure"] < offer.gpus:
        return Problem(name, f"a Pod has at most {row['maxCount']['secure']} of {offer.provider_type}", "plan again")
    usd = _usd(row, offer)
    if usd > quoted + CENT:
        said = f"{offer.gpus} x {offer.provider_type} costs ${usd:.2f} an hour now, the quote was ${quoted:.2f}"
        return Problem(name, said, "plan again with the price of today in recipes/hardware.yaml")
    return None


def _not_rented(name: str, offer: Offer) -> Problem:
    return Problem(name, f"Runpod does not rent {offer.provider_type} in Secure Cloud", "plan again")


def _nowhere(spec: LaunchSpec, planned: Offer, found: list[Candidate], limits: Limits) -> ProviderError:
    where = ", ".join(sorted(limits.datacenters)) or "any datacentre"
    if limits.compliance:
        where += f" with {', '.join(sorted(limits.compliance))}"
    elsewhere = sorted({candidate.datacenter for candidate in found})
    step = f"there is stock in {', '.join(elsewhere)}" if elsewhere else "launch it again later"
    said = f"no stock of {spec.gpus} x {planned.provider_type} or better in {where}"
    return ProviderError(Problem("Runpod", said, step))


def _allowed(datacenters: Sequence[Json], limits: Limits) -> set[str]:
    return {
        str(row["id"])
        for row in datacenters
        if (not limits.datacenters or row["id"] in limits.datacenters)
        and limits.compliance <= set(row.get("compliance") or ())
    }


def _stock(row: Json) -> list[tuple[str, str]]:
    """Datacentre and level, where there is any; the list is left out when there is none anywhere."""
    places = row.get("dataCenters") or ()
    return [(str(dc["id"]), dc["availability"]) for dc in places if dc.get("availability") in _LEVELS]


def _usd(row: Json, offer: Offer) -> float:
    return round(float(row["price"]["secure"]) * offer.gpus, 6)
