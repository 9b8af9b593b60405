"""Capacity Blocks: GPUs of AWS booked for fixed days, paid in full at once. Bought by typed words only.

blocks = find_blocks(client, "p5.48xlarge", nodes=2, hours=48); reservation = buy(client, blocks[0], typed, book)

A block cannot be cancelled or moved, and buying has no key that would make two requests one purchase. So nothing here
buys without the fee typed by a person, and an answer that was lost is looked for and never asked for again. What is
bought is written into the store before it is asked for, so that the month's ledger knows the fee in any case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from recipes.job import Record
from scripts.audit import record
from scripts.backends.aws import AwsError, ask
from scripts.backends.ec2_api import BLOCK_PRICE_TAG
from scripts.errors import Conflict, InputError, NotFound, Problem, ProviderError, Refused
from scripts.store import Store

DAY_HOURS, WEEK_HOURS = 24, 168
MOST_DAILY_HOURS, MOST_HOURS = 14 * DAY_HOURS, 26 * WEEK_HOURS
MOST_NODES = 64
"Of one block: EC2 user guide, Capacity Blocks, read 2026-11."
OFFERING_TAG = "lorry_offering"
FOLDER = "_capacity"
"No job can have this name."


class Block(Record):
    """One offer of AWS. usd: the fee for all of it, due at once. starts, ends: seconds since 1970."""

    offering: str
    instance_type: str
    zone: str
    nodes: int
    hours: int
    starts: float
    ends: float
    usd: float

    @property
    def usd_per_node_hour(self) -> float:
        """What an hour of one node comes to when all of it is used."""
        return self.usd / (self.nodes * self.hours)

    @property
    def words(self) -> str:
        """What a person has to type to buy it."""
        return f"buy {self.offering} for ${self.usd:,.2f}"


class Purchase(Block):
    """_capacity/OFFERING.json. One without a reservation may have been bought, and counts until AWS refused it."""

    format: Literal[1] = 1
    reservation: str | None = None
    refused: str = ""
    "What AWS said, where it did not sell."
    bought_at: float
    who: str


@dataclass(frozen=True)
class Book:
    """Where purchases are written down, and by whom this one is made. now: seconds since 1970."""

    store: Store
    who: str
    now: float

    def note(self, block: Block, **changes: object) -> None:
        """Writes what is known of a purchase; when and by whom it was made stays as it was written first."""
        key = f"{FOLDER}/{block.offering}.json"
        data = self.store.read(key)
        known = Purchase.model_validate_json(data) if data else None
        if known is None or known.refused:
            known = Purchase(**block.model_dump(), bought_at=self.now, who=self.who)
        self.store.write(key, known.model_copy(update=changes).model_dump_json(indent=2).encode() + b"\n")


def purchases(store: Store) -> list[Purchase]:
    """Every block that was bought, or may have been, in the order of their offerings."""
    found = [Purchase.model_validate_json(data) for key in store.keys(FOLDER) if (data := store.read(key))]
    return [purchase for purchase in found if not purchase.refused]


def find_blocks(client: Any, instance_type: str, nodes: int, hours: int) -> list[Block]:
    """What AWS offers now for so many nodes and hours, cheapest first. client: of EC2.

    Raises InputError for a length that is not sold, AwsError when AWS refuses.
    """
    _require_sold(nodes, hours)
    given: dict[str, Any] = {"InstanceType": instance_type, "InstanceCount": nodes, "CapacityDurationHours": hours}
    rows: list[Mapping[str, Any]] = []
    while True:
        answer = ask(client, "describe_capacity_block_offerings", **given)
        rows += answer["CapacityBlockOfferings"]
        if not answer.get("NextToken"):
            break
        given["NextToken"] = answer["NextToken"]
    return sorted((_block(row) for row in rows), key=lambda block: (block.usd, block.starts, block.offering))


def block_of(blocks: list[Block], offering: str) -> Block:
    """The one with that id. Raises NotFound: an offer lasts minutes, and its id is never given again."""
    found = next((block for block in blocks if block.offering == offering), None)
    if found is None:
        raise NotFound(
            Problem(f"offering {offering}", "AWS does not offer it any more", "look again: `lorry capacity`")
        )
    return found


def buy(client: Any, block: Block, typed: str, book: Book) -> str:
    """Buys the block, which is written into the book first, and returns the id of its reservation. typed: what a person
    typed, which must be `block.words`.

    Raises Refused for other words, Conflict when it was bought before, ProviderError when AWS refuses, or when nobody
    knows whether it was bought.
    """
    if typed.strip() != block.words:
        raise Refused(Problem("capacity", "nothing was bought: these were not the words", f"type: {block.words}"))
    if bought := _bought(client, block):
        book.note(block, reservation=bought)
        raise Conflict(Problem(f"offering {block.offering}", "it is bought already", f"use reservation {bought}"))
    book.note(block)
    what = f"${block.usd:,.2f}: {block.nodes} x {block.instance_type} for {block.hours} h"
    record(book.store, "buy", block.offering, who=book.who, now=book.now, note=what)
    try:
        answer = ask(client, "purchase_capacity_block", **_order(block))
        reservation = str(answer["CapacityReservation"]["CapacityReservationId"])
    except AwsError as error:
        if not error.maybe_done:
            book.note(block, refused=error.problems[0].got)
            raise
        if (bought := _bought(client, block)) is None:
            step = (
                "look in the EC2 console under Capacity Reservations before you buy again: a block is never given back"
            )
            raise ProviderError(Problem("capacity", "no answer; it may have been bought", step)) from None
        reservation = bought
    book.note(block, reservation=reservation)
    return reservation


def blocks_text(blocks: list[Block], now: float) -> str:
    """A line for each, with its fee. now: seconds since 1970."""
    if not blocks:
        return "AWS offers no Capacity Block of that kind now; another length, number or region may have one\n"
    lines = [f"{'offering':<24}{'zone':<12}{'nodes':>6}{'hours':>7}  {'starts (UTC)':<18}{'fee':>14}{'$/node-h':>10}"]
    for b in blocks:
        at = datetime.fromtimestamp(b.starts, UTC).strftime("%Y-%m-%d %H:%M")
        fee = f"${b.usd:,.2f}"
        lines.append(
            f"{b.offering:<24}{b.zone:<12}{b.nodes:>6}{b.hours:>7}  {at:<18}{fee:>14}{b.usd_per_node_hour:>10.2f}"
        )
    soonest = min((b.starts - now) / 3600 for b in blocks)
    lines.append(f"paid in full at once, never given back; the soonest starts in {max(0.0, soonest):.0f} hours")
    return "\n".join(lines) + "\n"


def _require_sold(nodes: int, hours: int) -> None:
    daily = hours % DAY_HOURS == 0 and DAY_HOURS <= hours <= MOST_DAILY_HOURS
    weekly = hours % WEEK_HOURS == 0 and WEEK_HOURS <= hours <= MOST_HOURS
    problems = []
    if not (daily or weekly):
        want = f"whole days up to {MOST_DAILY_HOURS} hours, then whole weeks up to {MOST_HOURS}"
        problems.append(Problem("--hours", str(hours), want))
    if not 1 <= nodes <= MOST_NODES:
        problems.append(Problem("--nodes", str(nodes), f"1 to {MOST_NODES}"))
    if problems:
        raise InputError(*problems)


def _order(block: Block) -> dict[str, Any]:
    """The arguments of PurchaseCapacityBlock. Its tags find the block again, and say what its machines cost."""
    tags = {OFFERING_TAG: block.offering, "Name": "lorry-capacity-block"}
    tags[BLOCK_PRICE_TAG] = f"{block.usd_per_node_hour:.6f}"
    listed = [{"Key": key, "Value": value} for key, value in tags.items()]
    return {
        "CapacityBlockOfferingId": block.offering,
        "InstancePlatform": "Linux/UNIX",
        "TagSpecifications": [{"ResourceType": "capacity-reservation", "Tags": listed}],
    }


def _bought(client: Any, block: Block) -> str | None:
    """The reservation that this very offer became."""
    wanted = [{"Name": f"tag:{OFFERING_TAG}", "Values": [block.offering]}]
    rows = ask(client, "describe_capacity_reservations", Filters=wanted)["CapacityReservations"]
    return str(rows[0]["CapacityReservationId"]) if rows else None


def _block(row: Mapping[str, Any]) -> Block:
    starts, ends = row["StartDate"], row["EndDate"]
    return Block(
        offering=str(row["CapacityBlockOfferingId"]),
        instance_type=str(row["InstanceType"]),
        zone=str(row["AvailabilityZone"]),
        nodes=int(row["InstanceCount"]),
        hours=int(row["CapacityBlockDurationHours"]),
        starts=starts.timestamp(),
        ends=ends.timestamp(),
        usd=float(row["UpfrontFee"]),
    )
