"""Which offers of a backend would do for a job beside the planned one: as many GPUs, as large and as fast. Pure."""

from __future__ import annotations

from recipes.catalog import Catalog, Offer
from recipes.job import LaunchSpec


def suitable(spec: LaunchSpec, catalog: Catalog) -> list[tuple[str, Offer]]:
    """The planned offer, and those of its backend that the deadline would hold for too; name and offer.

    Several nodes go over the same number of network cards, at least as fast.
    """
    planned = catalog.offers[spec.offer or ""]
    wanted = catalog.gpus[planned.gpu]
    found = []
    for name, offer in catalog.offers.items():
        gpu = catalog.gpus[offer.gpu]
        alike = offer.backend == spec.backend and offer.gpus == planned.gpus
        insisted = spec.recipe.hardware.gpu in (None, offer.gpu)
        as_good = gpu.memory_gib >= wanted.memory_gib and gpu.bf16_tflops >= wanted.bf16_tflops
        talks = spec.nodes == 1 or (offer.network_gb_per_second or 0) >= (planned.network_gb_per_second or 0)
        if name == spec.offer or (alike and insisted and as_good and talks):
            found.append((name, offer))
    return found
