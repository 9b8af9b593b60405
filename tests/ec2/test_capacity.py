"""Capacity Blocks are shown with their fee and bought once, by the very words that name it."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts import cli
from scripts.audit import verify
from scripts.backends import aws
from scripts.backends.aws import AwsError
from scripts.backends.ec2 import Ec2Backend
from scripts.capacity import Book, block_of, buy, find_blocks, purchases
from scripts.cost import ledger, settle, spent_this_month
from scripts.errors import Conflict, InputError, NotFound, ProviderError, Refused
from scripts.fake_runpod.clock import Clock
from scripts.job_folder import job_ids, read_job
from scripts.launch import launch
from scripts.state import job_state
from scripts.store import open_store
from tests.ec2.conftest import ENVIRONMENT, ec2_spec
from tests.ec2.local_ec2 import Account, Fault
from tests.ec2.test_submit import DOOR
from tests.runpod.conftest import data_in

START = datetime(2027, 1, 5, 11, 30, tzinfo=UTC)
NOW = datetime(2026, 12, 3, 9, 0, tzinfo=UTC).timestamp()
WORDS = "buy cbo-2 for $5,283.84"


class Market(Account):
    """Two offers; a bought one becomes a reservation."""

    bought: list[dict[str, Any]]

    def do_describe_capacity_block_offerings(self, given: dict[str, Any]) -> dict[str, Any]:
        about = {
            "InstanceType": given["InstanceType"], "AvailabilityZone": "us-east-1a", "StartDate": START,
            "InstanceCount": given["InstanceCount"], "CapacityBlockDurationHours": given["CapacityDurationHours"],
            "EndDate": START, "CurrencyCode": "USD",
        }  # fmt: skip
        first = "NextToken" not in given
        row = {**about, "CapacityBlockOfferingId": "cbo-1" if first else "cbo-2"}
        row["UpfrontFee"] = "6000.00" if first else "5283.84"
        return {"CapacityBlockOfferings": [row]} | ({"NextToken": "more"} if first else {})

    def do_describe_capacity_reservations(self, given: dict[str, Any]) -> dict[str, Any]:
        if "CapacityReservationIds" in given:
            wanted = given["CapacityReservationIds"]
            return {"CapacityReservations": [row for row in self.bought if row["CapacityReservationId"] in wanted]}
        (offering,) = given["Filters"]
        return {"CapacityReservations": [row for row in self.bought if row["offering"] in offering["Values"]]}

    def do_purchase_capacity_block(self, given: dict[str, Any]) -> dict[str, Any]:
        row = {"CapacityReservationId": "cr-0123456789abcdef0", "offering": given["CapacityBlockOfferingId"]}
        row["Tags"] = given["TagSpecifications"][0]["Tags"]
        self.bought.append(row)
        return {"CapacityReservation": row}


@pytest.fixture
def market(clock: Clock) -> Market:
    made = Market(clock)
    made.bought = []
    return made


@pytest.fixture
def book(tmp_path: Path) -> Book:
    return Book(open_store((tmp_path / "store").as_uri()), "ann", NOW)


@pytest.fixture
def lorry(
    market: Market, book: Book, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> Callable[..., tuple[int, str, str]]:
    """lorry("capacity", ..., typed="..."): exit code, output, errors."""
    monkeypatch.setattr(aws, "aws_client", market.client)
    monkeypatch.setattr("scripts.cli.the_rooms.time", SimpleNamespace(time=lambda: NOW))
    monkeypatch.setattr("scripts.cli.money.time", SimpleNamespace(time=lambda: NOW))
    monkeypatch.setenv("LORRY_STORE", book.store.url)
    monkeypatch.setenv("LORRY_ACTOR", "ann")
    monkeypatch.delenv("LORRY_CLIENTS", raising=False)

    def run(*words: str, typed: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        code = cli.main([*words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_offers_are_shown_cheapest_first_with_their_fee(lorry: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = lorry("capacity", "p5.48xlarge", "--nodes", "2", "--hours", "48")
    assert code == 0
    lines = out.splitlines()
    assert lines[1].split() == ["cbo-2", "us-east-1a", "2", "48", "2027-01-05", "11:30", "$5,283.84", "55.04"]
    assert lines[2].startswith("cbo-1")
    assert lines[3].startswith("paid in full at once, never given back")


def test_a_block_is_bought_by_its_words_and_says_what_to_set(
    lorry: Callable[..., tuple[int, str, str]], market: Market
) -> None:
    buying = ("capacity", "p5.48xlarge", "--nodes", "2", "--hours", "48", "--buy", "cbo-2")
    code, _, err = lorry(*buying, typed="yes\n")
    assert code == Refused.exit_code
    assert f"type: {WORDS}" in err
    assert market.bought == []
    code, out, _ = lorry(*buying, typed=WORDS + "\n")
    assert code == 0
    assert out.splitlines() == [
        "LORRY_EC2_MARKET=capacity-block",
        "LORRY_EC2_RESERVATION=cr-0123456789abcdef0",
    ]
    code, _, err = lorry(*buying, typed=WORDS + "\n")
    assert code == Conflict.exit_code
    assert "it is bought already; use reservation cr-0123456789abcdef0" in err
    assert len(market.bought) == 1


def test_a_purchase_stands_in_the_audit_and_in_the_ledger_of_its_month(
    lorry: Callable[..., tuple[int, str, str]], book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    buying = ("capacity", "p5.48xlarge", "--nodes", "2", "--hours", "48", "--buy", "cbo-2")
    lorry(*buying, typed="yes\n")
    assert purchases(book.store) == []
    lorry(*buying, typed=WORDS + "\n")
    (made,) = purchases(book.store)
    assert (made.reservation, made.usd, made.nodes, made.hours) == ("cr-0123456789abcdef0", 5283.84, 2, 48)
    assert (made.bought_at, made.who) == (NOW, "ann")
    entries = verify(book.store).entries
    assert [(e.what, e.subject, e.who) for e in entries] == [("buy", "cbo-2", "ann")]
    assert entries[0].note == "$5,283.84: 2 x p5.48xlarge for 48 h"
    assert job_ids(book.store) == []
    _, out, _ = lorry("cost", "--json")
    assert json.loads(out) == {book.store.url: 0.0, "Capacity Block cr-0123456789abcdef0": 5283.84}
    monkeypatch.setattr("scripts.cli.money.time", SimpleNamespace(time=lambda: NOW + 40 * 86_400))
    _, out, _ = lorry("cost", "--json")
    assert json.loads(out) == {book.store.url: 0.0}


def test_a_job_in_a_block_costs_its_share_of_the_fee_and_nothing_more_in_the_month(
    market: Market, clock: Clock, book: Book, tmp_path: Path
) -> None:
    client = market.client("ec2")
    reservation = buy(client, block_of(find_blocks(client, "p5.4xlarge", 2, 48), "cbo-2"), WORDS, book)
    environment = ENVIRONMENT | DOOR | {"LORRY_EC2_MARKET": "capacity-block", "LORRY_EC2_RESERVATION": reservation}
    backend = Ec2Backend(environment, now=clock.now, sleep=clock.jump, client=market.client)
    backend._bucket = lambda spec: "bucket"  # type: ignore[method-assign]
    store = open_store(f"{(tmp_path / 'store').as_uri()}/clients/acme/jobs")
    handle = launch(store, ec2_spec(store.url), None, data_in(tmp_path / "data"), backend, clock.now()).handle
    assert handle["prepaid"] == reservation
    assert spent_this_month(*ledger(store, ["job-1"]), clock.now()) == 0.0
    clock.jump(3600.0)
    market.end(handle["instances"][0])
    files = read_job(store, "job-1")
    done = settle(store, files, job_state(files, backend.observe(handle), clock.now()), backend.charges, clock.now())
    assert done is not None
    assert (done.usd, done.prepaid) == (pytest.approx(5283.84 / (2 * 48), abs=0.01), reservation)
    assert spent_this_month(*ledger(store, ["job-1"]), clock.now()) == 0.0


def test_an_answer_that_was_lost_is_looked_for_and_never_asked_for_again(market: Market, book: Book) -> None:
    client = market.client("ec2")
    block = block_of(find_blocks(client, "p5.48xlarge", 2, 48), "cbo-2")
    market.faults.append(Fault("purchase_capacity_block", "", carried_out=True))
    assert buy(client, block, WORDS, book) == "cr-0123456789abcdef0"
    market.bought.clear()
    market.faults.append(Fault("purchase_capacity_block", ""))
    with pytest.raises(ProviderError, match="it may have been bought; look in the EC2 console"):
        buy(client, block, WORDS, book)
    assert [one.reservation for one in purchases(book.store)] == ["cr-0123456789abcdef0"], "it may have been paid"
    assert [name for name, _ in market.log].count("purchase_capacity_block") == 2
    market.faults.append(Fault("purchase_capacity_block", "UnauthorizedOperation"))
    with pytest.raises(AwsError, match="UnauthorizedOperation"):
        buy(client, block, WORDS, book)
    assert purchases(book.store) == []


@pytest.mark.parametrize(
    ("nodes", "hours", "sentence"),
    [
        (1, 25, "--hours: 25; whole days"),
        (1, 360, "--hours: 360"),
        (65, 24, "--nodes: 65; 1 to 64"),
        (1, 0, "--hours: 0"),
    ],
)
def test_what_is_not_sold_is_refused_before_aws_is_asked(nodes: int, hours: int, sentence: str, market: Market) -> None:
    with pytest.raises(InputError, match=sentence):
        find_blocks(market.client("ec2"), "p5.48xlarge", nodes, hours)
    assert market.log == []


def test_an_offer_that_is_gone_is_a_sentence(market: Market) -> None:
    with pytest.raises(NotFound, match="AWS does not offer it any more"):
        block_of(find_blocks(market.client("ec2"), "p5.48xlarge", 1, 336), "cbo-9")
