"""Commands that look after money: do what is due, end what is overdue, say what it did cost."""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from recipes.recipe import BackendName
from scripts.backends.base import Backend, machine_of
from scripts.cli.command import Command, add_json
from scripts.errors import LorryError, NotFound, Problem, ProviderError
from scripts.job_folder import job_ids, read_job
from scripts.settings import Settings
from scripts.store import open_store

if TYPE_CHECKING:
    from scripts.forgotten import Forgotten
    from scripts.reap import Decision
    from scripts.tick import TickReport


def _tick(arguments: argparse.Namespace, settings: Settings) -> int:
    from scripts.rooms import open_hands, open_rooms
    from scripts.tick import tick

    report = tick(open_rooms(os.environ, settings.store), open_hands(os.environ))
    _restore_endpoints(settings, report)
    if arguments.json:
        print(json.dumps(asdict(report), indent=2))
    else:
        for sentence in report.done:
            print(sentence)
        left = f", {report.left} left for the next tick" if report.left else ""
        print(f"looked at {report.looked_at} open jobs{left}")
    if report.troubles:
        raise ProviderError(
            *(Problem("tick", sentence, "the next tick tries it again") for sentence in report.troubles)
        )
    return 0


def _restore_endpoints(settings: Settings, report: TickReport) -> None:
    """Gives serving endpoints their workers back where whoever drained them did not live to do it."""
    from scripts.backends.runpod_api import RunpodApi
    from scripts.serving.runpod_endpoint import endpoint_ids, restore

    store = open_store(settings.store)
    try:
        for endpoint in endpoint_ids(store):
            with RunpodApi.of(os.environ) as api:
                if not restore(api, store, endpoint, time.time()):
                    report.left += 1
    except LorryError as error:
        report.troubles.append(f"serving endpoints: {error}")


def _reap_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--yes", action="store_true", help="end what is overdue (default: only say so)")
    add_json(parser)


def _reap(arguments: argparse.Namespace, settings: Settings) -> int:
    from scripts.backends import open_backend, rented
    from scripts.reap import make_rounds
    from scripts.rooms import is_within

    environment = {**os.environ, "LORRY_STORE": settings.store}
    backends: dict[BackendName, Backend] = {name: open_backend(name, environment) for name in rented(environment)}
    ours = partial(is_within, settings.store)
    rounds = make_rounds(backends, open_store, ours, time.time(), ends=arguments.yes)
    if "runpod_pod" not in rounds.unseen:
        pods = {str(machine_of(machine.owned.handle)) for machine in rounds.machines}
        rounds.report("runpod_pod report", lambda: _forgotten(pods))
    _print_decisions(arguments, rounds.decisions, rounds.troubles)
    if rounds.troubles:
        said = rounds.troubles.items()
        raise ProviderError(*(Problem(name, trouble, "the next run tries it again") for name, trouble in said))
    return 0


def _print_decisions(arguments: argparse.Namespace, decisions: list[Decision], troubles: dict[str, str]) -> None:
    if arguments.json:
        fields = ("action", "name", "reason", "usd_per_month")
        said = [{name: getattr(decision, name) for name in fields} for decision in decisions]
        print(json.dumps({"acted": arguments.yes, "decisions": said, "troubles": troubles}, indent=2))
        return
    done = "ended" if arguments.yes else "would end"
    for d in decisions:
        word = "report" if d.action == "report" else "not ended" if d.name in troubles else done
        print(f"{word:<10} {d.name}: {d.reason}; ${d.usd_per_month:,.2f} a month")
    if not arguments.yes and any(d.action == "stop" for d in decisions):
        print("nothing was ended; `lorry reap --yes` ends it")


def _forgotten(owned: set[str]) -> tuple[Forgotten, ...]:
    from scripts.backends.runpod_api import RunpodApi
    from scripts.backends.runpod_machines import Clusters, Pods
    from scripts.forgotten import forgotten

    if not os.environ.get("RUNPOD_API_KEY"):
        return ()
    with RunpodApi.of(os.environ) as api:
        rented = Pods(api).listed() + Clusters(api).listed()
        return tuple(forgotten(rented, api.listed("network-volumes"), api.listed("serverless"), owned))


def _cost_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB", nargs="?", help="one job; without it, this month of each client")
    parser.add_argument("--client", help="the job is one of this client")
    add_json(parser)


def _cost(arguments: argparse.Namespace, settings: Settings) -> int:
    return _job_cost(arguments, settings) if arguments.job else _month_cost(arguments, settings)


def _job_cost(arguments: argparse.Namespace, settings: Settings) -> int:
    """Settles a job that is over, and shows the quote against the bill; of one that goes on, what it cost so far."""
    from scripts.cost import settle
    from scripts.rooms import client_store, open_hands
    from scripts.tick import Room, visit_of

    url = client_store(settings.store, arguments.client) if arguments.client else settings.store
    store, hands = open_store(url), open_hands(os.environ)
    files = read_job(store, arguments.job)
    if files.launch is None:
        raise NotFound(Problem(f"job {arguments.job}", f"no such job in {store.url}", "see `lorry jobs`"))
    seen = None
    if files.submission is not None and files.submission.handle:
        seen = hands.backend(files.launch.backend).observe(files.submission.handle)
    visit = visit_of(Room(store), read_job(store, arguments.job), None, seen, hands.now())
    over = visit.state.is_final and visit.has_no_machine
    settlement = settle(store, visit.files, visit.state, hands.bill, visit.now) if over else None
    usd = settlement.usd if settlement else visit.state.spent_usd
    source = settlement.source if settlement else "so far"
    if arguments.json:
        settled = settlement.model_dump(mode="json") if settlement else None
        print(json.dumps({"job": arguments.job, "quote_usd": files.launch.quote_usd, "cap_usd": files.launch.cap_usd,
                          "usd": usd, "settlement": settled}, indent=2))  # fmt: skip
        return 0
    said = {"bill": "billed", "lifetime": "machine hours", "hours": "hours x price", "so far": "so far"}[source]
    print(f"{'quoted':<14} at most ${files.launch.quote_usd:.2f}")
    print(f"{'cap':<14} ${files.launch.cap_usd:.2f}")
    print(f"{said:<14} " + ("not known" if usd is None else f"${usd:.2f}"))
    if (submission := files.submission) is not None and (block := submission.handle.get("prepaid")):
        print(f"{'prepaid':<14} in Capacity Block {block}: paid with its fee, which is in the ledger of its month")
    if settlement is not None and not settlement.is_final:
        print("the bill is not closed yet; ask again in a few hours")
    return 0


def _month_cost(arguments: argparse.Namespace, settings: Settings) -> int:
    from scripts.capacity import purchases
    from scripts.cost import is_same_month, ledger, spent_this_month
    from scripts.rooms import open_rooms

    now, totals = time.time(), {}
    for room in open_rooms(os.environ, settings.store):
        totals[room.store.url] = spent_this_month(*ledger(room.store, job_ids(room.store)), now)
    for block in purchases(open_store(settings.store)):
        if is_same_month(block.bought_at, now):
            totals[f"Capacity Block {block.reservation or block.offering}"] = block.usd
    if arguments.json:
        print(json.dumps(totals, indent=2))
    else:
        for url, usd in totals.items():
            print(f"${usd:>10,.2f}  {url}")
        print("spent this month (UTC); an unsettled job counts with its cap, one in a Capacity Block with its fee")
    return 0


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("plan",), help="plan: what the planner said against what came")
    parser.add_argument("jobs", metavar="JOB", nargs="+", help="job ids; `lorry jobs` lists them")
    add_json(parser)


def _bench(arguments: argparse.Namespace, settings: Settings) -> int:
    from scripts.bench_plan import compare, medians, table

    store = open_store(settings.store)
    found = {job: compare(store, job) for job in arguments.jobs}
    if arguments.json:
        jobs = {job: [asdict(row) | {"ratio": row.ratio} for row in rows] for job, rows in found.items()}
        print(json.dumps({"jobs": jobs, "medians": medians(found.values())}, indent=2))
    else:
        print(table(found))
    return 0


COMMANDS = (
    Command("tick", "do what is due: overdue stops, callbacks, settlements", add_json, _tick),
    Command("reap", "end machines that are ours and overdue; report what is forgotten", _reap_arguments, _reap),
    Command("bench", "compare plan and reality of jobs that ran", _bench_arguments, _bench),
    Command("cost", "say what a job or the month did cost, against its quote", _cost_arguments, _cost),
)
