"""The tables of facts: dated, cross-checked, spread over counts of GPUs without changing a price."""

from __future__ import annotations

import datetime

import pytest

from recipes.catalog import FOLDER, Catalog, Tables, catalog_of, load_catalog
from recipes.errors import InputError
from recipes.load import load_recipe, recipe_names
from recipes.strict_yaml import read_yaml
from recipes.validate import validated

CATALOG = load_catalog()


def _tables() -> dict[str, dict[str, dict[str, object]]]:
    files = [read_yaml((FOLDER / name).read_text(), name)[0] for name in ("models.yaml", "hardware.yaml")]
    return files[0] | files[1]


def _catalog(tables: object) -> Catalog:
    return catalog_of(validated(Tables, tables, "tables"))


def test_every_row_has_a_source_and_a_date_that_has_been() -> None:
    rows = {**CATALOG.families, **CATALOG.models, **CATALOG.gpus, **CATALOG.offers}
    assert len(rows) > 60
    for name, row in rows.items():
        assert len(row.source) > 3, name
        assert datetime.date(2026, 1, 1) <= row.date <= datetime.date(2026, 11, 27), name


@pytest.mark.parametrize(
    ("offer", "usd_per_hour"),
    [
        ("ec2-p5-8", 55.04),
        ("ec2-p5-4xlarge-1", 6.88),
        ("ec2-p5en-8", 63.296),
        ("ec2-p4de-8", 27.44705),
        ("ec2-g7e-8", 33.14432),
        ("sagemaker-p5-8", 63.296),
        ("sagemaker-p4d-8", 25.251288),
        ("runpod-h200-8", 36.72),
        ("runpod-h100-sxm-8", 31.92),
        ("runpod-h200-4", 18.36),
        ("runpod-flex-h200-1", 0.00155 * 3600),
        ("local-2", 0.0),
    ],
)
def test_price_of_a_node_is_the_published_one(offer: str, usd_per_hour: float) -> None:
    assert CATALOG.offers[offer].usd_per_hour == pytest.approx(usd_per_hour, abs=1e-5)


def test_sagemaker_costs_fifteen_percent_more_than_ec2() -> None:
    pairs = [(n, n.replace("ec2-", "sagemaker-")) for n in CATALOG.offers if n.startswith("ec2-")]
    assert len(pairs) == 9
    for ec2, sagemaker in pairs:
        ratio = CATALOG.offers[sagemaker].usd_per_hour / CATALOG.offers[ec2].usd_per_hour
        assert ratio == pytest.approx(1.15, abs=1e-6)


def test_offer_is_named_after_its_row_and_its_gpus() -> None:
    for name, offer in CATALOG.offers.items():
        assert name.endswith(f"-{offer.gpus}")


def test_no_gpu_promises_more_than_its_label() -> None:
    labels = {"a100-40": 40, "a100": 80, "h100-nvl": 94, "h100": 80, "h200": 141, "b200": 192, "l40s": 48, "rtx": 96}
    for name, gpu in CATALOG.gpus.items():
        label = next((size for start, size in labels.items() if name.startswith(start)), None)
        assert gpu.device == "cpu" or (label and gpu.memory_gib < label * 1e9 / 2**30 * 1.075), name


def test_offer_with_an_unknown_gpu_is_refused() -> None:
    tables = _tables()
    tables["offers"]["local"]["gpu"] = "abacus"
    with pytest.raises(InputError, match=r"offers\.local\.gpu.*'abacus'"):
        _catalog(tables)


def test_model_of_an_unknown_family_is_refused() -> None:
    tables = _tables()
    tables["models"]["Qwen/Qwen3-8B"]["family"] = "qwen9"
    with pytest.raises(InputError, match="'qwen9'"):
        _catalog(tables)


def test_row_without_a_source_is_refused() -> None:
    tables = _tables()
    del tables["gpus"]["h200"]["source"]
    with pytest.raises(InputError, match=r"gpus\.h200\.source: missing"):
        _catalog(tables)


def test_every_model_has_a_recipe() -> None:
    used = {load_recipe(name).recipe.base.id for name in recipe_names()}
    assert set(CATALOG.models) == used
