"""Deletes a client: everything below its prefix, in the store and wherever else it lies, with a certificate of it.

asked = survey(root, "acme", places); certificate = delete_client(asked, connect, who="ann", now=time.time())
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from recipes.job import Record
from recipes.serving import Place as ServingPlace
from scripts import audit
from scripts.errors import InputError, NotFound, Problem, Refused, VerificationFailed
from scripts.job_folder import JobFiles, job_ids, read_jobs
from scripts.job_token import CLIENT_NAME
from scripts.rooms import client_notes, client_store
from scripts.serving.client import Vllm
from scripts.serving.leave import Left, Traces, leave, traces
from scripts.state import JobState
from scripts.store import open_store
from scripts.store.erase import Removed, erase, still_there

State = Callable[[JobFiles], JobState]

CERTIFICATES = "_certificates"
NOT_COVERED = (
    "backups and replicas that the bucket's owner made by other means",
    "what the client's own database and storage (Supabase) hold",
    "logs that a cloud provider keeps of its own machines",
)


class Place(Record):
    """One place that was emptied."""

    url: str
    removed: int
    bytes: int
    sha256: str
    "SHA-256 over the list of what was there, as JSON lines of `Removed`."


class Certificate(Record):
    """_certificates/acme-1700000000.json: what was deleted, when, by whom. It holds no name of a file."""

    format: Literal[1] = 1
    client: str
    by: str
    at: float
    jobs: tuple[str, ...]
    places: tuple[Place, ...]
    servers: tuple[Left, ...] = ()
    "The servers of the private model that its adapters were published to."
    audit_head: str
    "The head of the client's own audit chain, which was deleted with it."
    not_covered: tuple[str, ...] = NOT_COVERED


@dataclass(frozen=True)
class Survey:
    """What a deletion would remove: (URL, what lies there) per place."""

    root: str
    client: str
    jobs: tuple[str, ...]
    places: tuple[tuple[str, tuple[Removed, ...]], ...]
    audit_head: str
    there: Traces

    @property
    def objects(self) -> int:
        """How many objects, versions and markers there are in all places."""
        return sum(len(found) for _, found in self.places)


def survey(root: str, client: str, places: Sequence[str], *, known: bool, state: State) -> Survey:
    """Looks, and changes nothing. places: URLs of other stores with the same layout, such as a volume; the folders that
    `lorry serve` copied adapters to are known.

    known: whether the front door still knows the client. state: how a job stands, by its provider's word.

    Raises NotFound when nothing is there, Refused while a job of the client runs or the front door still lets the
    client in, InputError for what cannot be a client.
    """
    if not CLIENT_NAME.fullmatch(client):
        raise InputError(Problem("client", ascii(client[:60]), "2 to 32 of a-z, 0-9 and hyphens"))
    jobs = open_store(client_store(root, client))
    ids = job_ids(jobs)
    problems = [
        Problem(f"job {files.job_id}", "it has not ended", f"`lorry stop {files.job_id}` with this client's store")
        for files in read_jobs(jobs, ids)
        if files.submission is not None and not state(files).is_final
    ]
    if known:
        problems.append(Problem("LORRY_CLIENTS", f"still holds {client}", "remove it, so that nothing new arrives"))
    if problems:
        raise Refused(*problems)
    there = traces(jobs)
    roots = dict.fromkeys(place.rstrip("/") for place in (root, *places, *there.folders))
    urls = [f"{place}/clients/{client}" for place in roots]
    found = tuple((url, tuple(still_there(url))) for url in urls)
    if not any(items for _, items in found):
        raise NotFound(Problem(f"client {client}", f"nothing of it in {', '.join(urls)}", "the name as in the store"))
    head = str(audit.verify(open_store(client_notes(root, client))).head)
    return Survey(root, client, tuple(ids), found, head, there)


def delete_client(asked: Survey, connect: Callable[[ServingPlace], Vllm], *, who: str, now: float) -> Certificate:
    """Removes it all, looks again, and writes the certificate and an audit entry in the root store.

    connect: a client of the server of a place. The root store goes last: it says where everything else is.

    Raises VerificationFailed when something is still there afterwards, ProviderError when a store fails; called again,
    after a new survey, it goes on with what is left.
    """
    root = open_store(asked.root)
    audit.record(root, "delete", asked.client, who=who, now=now, note=f"begins: {asked.objects} objects")
    servers = tuple(leave(asked.there, asked.client, connect))
    places = tuple(reversed([_emptied(url) for url, _ in reversed(asked.places)]))
    certificate = Certificate(
        client=asked.client,
        by=who,
        at=now,
        jobs=asked.jobs,
        places=places,
        servers=servers,
        audit_head=asked.audit_head,
    )
    data = certificate.model_dump_json(indent=2).encode() + b"\n"
    key = f"{CERTIFICATES}/{asked.client}-{int(now)}.json"
    root.write(key, data)
    note = f"done, certificate {key} with sha256 {hashlib.sha256(data).hexdigest()}"
    audit.record(root, "delete", asked.client, who=who, now=now, note=note)
    return certificate


def _emptied(url: str) -> Place:
    removed = erase(url)
    if left := still_there(url):
        want = "allow s3:DeleteObjectVersion and s3:AbortMultipartUpload here, end writers, then try again"
        raise VerificationFailed(Problem(url, f"{len(left)} objects are still there, first {left[0].key}", want))
    listed = "".join(json.dumps(item.model_dump(), sort_keys=True) + "\n" for item in removed)
    size = sum(item.bytes for item in removed)
    return Place(url=url, removed=len(removed), bytes=size, sha256=hashlib.sha256(listed.encode()).hexdigest())
