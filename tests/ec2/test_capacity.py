"""Capacity Blocks are shown with their fee and bought once, by the very words that name it."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from scripts import cli
from scripts.backends import aws
from scripts.backends.aws import AwsError
from scripts.capacity import block_of, buy, find_blocks
from scripts.errors import Conflict, InputError, NotFound, ProviderError, Refused
from scripts.fake_runpod.clock import Clock
from tests.ec2.local_ec2 import Account, Fault

START = datetime(2027, 1, 5, 11, 30, tzinfo=UTC)
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
        (wanted,) = given["Filters"]
        return {"CapacityReservations": [row for row in self.bought if row["offering"] in wanted["Values"]]}

    def do_purchase_capacity_block(self, given: dict[str, Any]) -> dict[str, Any]:
        row = {"CapacityReservationId": "cr-0123456789abcdef0", "offering": given["CapacityBlockOfferingId"]}
        self.bought.append(row)
        return {"CapacityReservation": row}


@pytest.fixture
def market(clock: Clock) -> Market:
    made = Market(clock)
    made.bought = []
    return made


@pytest.fixture
def lorry(market: Market, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[..., tuple[int, str, str]]:
    """lorry("capacity", ..., typed="..."): exit code, output, errors."""
    monkeypatch.setattr(aws, "aws_client", market.client)

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


def test_an_answer_that_was_lost_is_looked_for_and_never_asked_for_again(market: Market) -> None:
    client = market.client("ec2")
    block = block_of(find_blocks(client, "p5.48xlarge", 2, 48), "cbo-2")
    market.faults.append(Fault("purchase_capacity_block", "", carried_out=True))
    assert buy(client, block, WORDS) == "cr-0123456789abcdef0"
    market.bought.clear()
    market.faults.append(Fault("purchase_capacity_block", ""))
    with pytest.raises(ProviderError, match="it may have been bought; look in the EC2 console"):
        buy(client, block, WORDS)
    assert [name for name, _ in market.log].count("purchase_capacity_block") == 2
    market.faults.append(Fault("purchase_capacity_block", "UnauthorizedOperation"))
    with pytest.raises(AwsError, match="UnauthorizedOperation"):
        buy(client, block, WORDS)


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
