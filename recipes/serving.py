"""The files of a serving place: which adapter is live there, which were before, and everything that was tried.

_serving/PLACE/00000001.json and so on in the store: each is the whole state after one deed, created once.
_outcomes/PLACE/JOB/WINDOW/REPORTER.json: how users' own chats with an adapter ended, as counts.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from recipes.job import Record

Deed = Literal["publish", "canary", "roll back", "reload"]


class Place(Record):
    """A server of the private model, and how adapters reach it."""

    url: Annotated[str, AfterValidator(lambda url: url.rstrip("/").removesuffix("/v1"))]
    "Without the /v1 of its routes, which may be given."
    base: str
    "The name of the base model there, which is its id in recipes/models.yaml."
    adapters: str
    "URL of the folder that adapters are copied to: file:///... or s3://bucket/prefix."
    mounted: str
    "The same folder as the server's machine sees it."
    form: Literal["peft", "vllm", "shared"] = "vllm"
    "As the server reads adapters of experts. shared: it runs with --enable-moe-shared-loras."
    max_lora_rank: int = 16
    base_sha256: str | None = None
    "The base's files, as the first adapter published here was trained on them; another revision is refused."
    expert_gib: float | None = None
    "GPU memory that the server has for LoRA buffers of experts, where a person said it."
    endpoint: str | None = None
    "Id of the Runpod serverless endpoint behind the URL, whose list of adapters is changed instead of a runtime load."


class Serving(Record):
    """One state of a place. live: the job whose adapter users get; earlier: what was live before, newest first."""

    format: Literal[1] = 1
    number: int
    place: Place
    live: str | None
    earlier: tuple[str, ...] = ()
    canary: str | None = None
    canary_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    deed: Deed
    job_id: str
    "Whom the deed was about."
    by: str
    at: float
    outcome: Literal["begun", "done", "failed"]
    sentence: str = ""
    effect: float | None = None
    error: float | None = None
    "As scripts.serving.probe heard them."


class Outcomes(Record):
    """How chats with one adapter ended in five minutes, as one process of the web app counted them; no text of them."""

    answered: Annotated[int, Field(ge=0)] = 0
    failed: Annotated[int, Field(ge=0)] = 0
    "No answer, an error, or a blank one."


class EndpointState(Record):
    """_endpoints/ID/00000001.json and so on: what a Runpod endpoint shall be, written before it is made so."""

    format: Literal[1] = 1
    number: int
    endpoint: str
    modules: dict[str, str]
    "Adapter -> its folder as a worker sees it."
    workers_min: int
    workers_max: Annotated[int, Field(ge=1)]
    by: str
    at: float
