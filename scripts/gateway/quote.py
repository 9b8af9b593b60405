"""/quote: what a training would do and cost, before anything is launched. The body is that of /run.

Without dataset_url it is a quote for a nominal training set.
"""

from __future__ import annotations

from starlette.routing import Route

from scripts.gateway.door import Door
from scripts.gateway.http import Call, endpoint
from scripts.gateway.queue import PREFIX, asked_of
from scripts.gateway.submission import Planned, quote, understood_of
from scripts.gateway.views import Json

_OFFERS_SHOWN = 12


def routes(door: Door) -> list[Route]:
    """The path of a quote."""
    return [Route(f"{PREFIX}/quote", endpoint(door, _quote), methods=["POST"])]


def _quote(door: Door, call: Call) -> Json:
    asked = asked_of(door, call.fields())
    planned = quote(door, call.client, asked)
    return {"understood": understood_of(asked, planned.loaded).model_dump(mode="json")} | quote_view(planned)


def quote_view(planned: Planned) -> Json:
    """Price, time and place, and what the other offers would be like."""
    spec, plan = planned.spec, planned.plan
    offers = {offer.offer: offer for offer in plan.offers}
    chosen = offers[spec.offer or ""]
    fitting = sorted((o for o in plan.offers if o.usd and o.fits), key=lambda o: o.usd.likely if o.usd else 0.0)
    return {
        "gpu": spec.offer,
        "gpu_count": spec.gpus * spec.nodes,
        "backend": spec.backend,
        "usd": chosen.usd.model_dump() if chosen.usd else None,
        "hours": chosen.hours.model_dump() if chosen.hours else None,
        "quote_usd": spec.quote_usd,
        "cap_usd": spec.cap_usd,
        "deadline_seconds": spec.deadline_seconds,
        "total_steps": spec.total_steps,
        "train_examples": spec.train_examples,
        "valid_examples": spec.valid_examples,
        "train_tokens": plan.train_tokens,
        "prices_of": plan.prices_of,
        "notes": list(planned.notes),
        "others": [
            {
                "gpu": o.offer,
                "usd": o.usd.model_dump() if o.usd else None,
                "hours": o.hours.model_dump() if o.hours else None,
            }
            for o in fitting[:_OFFERS_SHOWN]
            if o.offer != spec.offer
        ],
    }
