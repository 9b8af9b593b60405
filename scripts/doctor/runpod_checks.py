"""Checks of a Runpod room: key, clock, volume, template, endpoint, secrets, stock."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from scripts.backends.runpod_api import RunpodApi
from scripts.backends.runpod_errors import RunpodError
from scripts.doctor.finding import NO_ROOM, Check, Finding, Subject, failed, not_checked, ok
from scripts.secrets import check_secrets

_MOST_SKEW_SECONDS = 60  # signed requests to S3 are refused beyond 5 minutes, webhooks sooner
_NOBODY = "lorry-doctor-probe"  # an id that no Pod has
_SERVERLESS_MOUNT = "/runpod-volume"
_APPLY = "run plan and apply on the Terraform root again"

RoomCheck = Callable[[Subject, RunpodApi], Iterator[Finding]]


def check_key(subject: Subject) -> Iterator[Finding]:
    """Whether the key reaches the control plane, and whether it may change things there."""
    runpod = subject.runpod
    if runpod is None:
        yield not_checked("Runpod key", subject.why_no_runpod)
        return
    try:
        pods = runpod.listed("pods")
    except RunpodError as error:
        if error.status not in (401, 403):
            raise
        step = "make a key with read and write access to the API; a key limited to endpoints is not enough"
        yield failed("Runpod key", f"it may not list Pods (status {error.status})", step)
        return
    try:
        runpod.ask("DELETE", f"/pods/{_NOBODY}")
    except RunpodError as error:
        if error.status in (401, 403):
            yield failed("Runpod key", "it may read but not change", "make a key with read and write access")
            return
        if error.status != 404:
            raise
    yield ok("Runpod key", f"it may read and change the account; {len(pods)} Pods now")


def _of_room(name: str, *fields: str) -> Callable[[RoomCheck], Check]:
    """Turns a check that needs a key and fields of the room into one that says when it lacks them."""

    def wrap(check: RoomCheck) -> Check:
        @functools.wraps(check)
        def checked(subject: Subject) -> Iterator[Finding]:
            if subject.runpod is None:
                yield not_checked(name, subject.why_no_runpod)
            elif any(not subject.rooms.get(field) for field in fields):
                yield not_checked(name, "no applied Runpod room was given", NO_ROOM)
            else:
                yield from check(subject, subject.runpod)

        return checked

    return wrap


@_of_room("clock")
def check_clock(subject: Subject, runpod: RunpodApi) -> Iterator[Finding]:
    """This machine's clock against the Date of an answer."""
    theirs = runpod.server_time()
    if theirs is None:
        yield not_checked("clock", "Runpod's answer has no date")
        return
    skew = (subject.now - theirs).total_seconds()
    if abs(skew) > _MOST_SKEW_SECONDS:
        seen = f"this machine is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} Runpod"
        yield failed("clock", seen, "let the machine set its clock by NTP; signed requests will be refused")
    else:
        yield ok("clock", f"within {_MOST_SKEW_SECONDS} s of Runpod's")


@_of_room("volume", "volume_id", "datacenter")
def check_volume(subject: Subject, runpod: RunpodApi) -> Iterator[Finding]:
    """The network volume exists where the room says."""
    volume_id, home = subject.rooms["volume_id"], subject.rooms["datacenter"]
    volume = runpod.read("network-volumes", volume_id)
    if volume is None:
        yield failed("volume", f"there is no volume {volume_id}", _APPLY)
    elif volume["dataCenter"] != home:
        yield failed("volume", f"{volume_id} is in {volume['dataCenter']}, the room is in {home}", _APPLY)
    else:
        yield ok("volume", f"{volume_id}, {volume['size']} GB in {home}")


@_of_room("Pod template", "pod_template_id", "volume_mount_path")
def check_template(subject: Subject, runpod: RunpodApi) -> Iterator[Finding]:
    """The Pod template looks for models on the volume, where Pods mount it."""
    template = runpod.read("templates", subject.rooms["pod_template_id"])
    if template is None:
        yield failed("Pod template", f"there is no template {subject.rooms['pod_template_id']}", _APPLY)
    else:
        yield _mount("Pod template", template, subject.rooms["volume_mount_path"])


@_of_room("training endpoint", "training_endpoint_id", "volume_id", "datacenter")
def check_endpoint(subject: Subject, runpod: RunpodApi) -> Iterator[Finding]:
    """The training endpoint mounts the volume, runs where it is, and has a time limit."""
    name, rooms = "training endpoint", subject.rooms
    endpoint = runpod.read("serverless", rooms["training_endpoint_id"])
    if endpoint is None:
        yield failed(name, f"there is no endpoint {rooms['training_endpoint_id']}", _APPLY)
        return
    faults = []
    if rooms["volume_id"] not in (endpoint.get("networkVolumes") or []):
        faults.append(failed(name, f"it does not mount volume {rooms['volume_id']}", _APPLY))
    if endpoint.get("dataCenterIds") and rooms["datacenter"] not in endpoint["dataCenterIds"]:
        seen = f"it runs in {', '.join(endpoint['dataCenterIds'])}, the volume is in {rooms['datacenter']}"
        faults.append(failed(name, seen, _APPLY))
    if not endpoint.get("timeout"):
        faults.append(failed(name, "its time limit is 0", _APPLY))
    if not (endpoint.get("workers") or {}).get("max"):
        seen = "it may start no worker: 7 days without a job set that to 0"
        faults.append(failed(name, seen, _APPLY))
    yield from faults or [_mount(name, endpoint, _SERVERLESS_MOUNT)]


@_of_room("secrets")
def check_secret_references(subject: Subject, runpod: RunpodApi) -> Iterator[Finding]:
    """Every secret that a template or endpoint refers to exists."""
    secrets = check_secrets(runpod, subject.rooms.get("secret_names") or ())
    for secret in secrets:
        if secret.state == "missing":
            seen = f"{secret.name} does not exist" + (
                f", needed by {', '.join(secret.used_by)}" if secret.used_by else ""
            )
            yield failed("secrets", seen, f"set {secret.variable} and run `lorry secrets`")
    if all(secret.state == "present" for secret in secrets):
        yield ok("secrets", f"all {len(secrets)} that templates and endpoints refer to exist")


@_of_room("stock", "gpu_types", "datacenter")
def check_stock(subject: Subject, runpod: RunpodApi) -> Iterator[Finding]:
    """The GPUs the room wants can be rented in the volume's datacentre."""
    home = subject.rooms["datacenter"]
    catalog = {gpu["id"]: gpu for gpu in runpod.gpus()}
    for wanted in subject.rooms["gpu_types"]:
        gpu = catalog.get(wanted)
        if gpu is None:
            near = difflib.get_close_matches(wanted, catalog, n=1, cutoff=0.4)
            step = f"did you mean '{near[0]}'?" if near else f"one of {', '.join(sorted(catalog))}"
            yield failed("stock", f"Runpod rents no GPU '{wanted}'", step)
            continue
        levels = {row["id"]: row["availability"] for row in gpu.get("dataCenters") or []}
        level = levels.get(home, "NONE")
        if level == "NONE":
            others = sorted(dc for dc, at in levels.items() if at != "NONE")
            step = f"wait, take another GPU, or a volume in {', '.join(others)}" if others else "wait, or another GPU"
            yield failed("stock", f"no {wanted} in {home} now", step)
        else:
            yield ok("stock", f"{wanted} in {home}: {level}, ${gpu['price']['secure']:.2f} per GPU-hour")


def _mount(name: str, holder: dict[str, Any], mount: str) -> Finding:
    models = (holder.get("env") or {}).get("LORRY_MODELS", "")
    if not models.startswith(f"{mount.rstrip('/')}/"):
        seen = f"LORRY_MODELS is {models!r}, but the volume is mounted at {mount}"
        return failed(name, seen, _APPLY)
    return ok(name, f"{holder['name']} reads models from {models}")


ROOM_CHECKS: dict[str, Check] = {
    "volume": check_volume,
    "Pod template": check_template,
    "training endpoint": check_endpoint,
    "secrets": check_secret_references,
    "stock": check_stock,
}
