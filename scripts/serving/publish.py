"""Publishes an adapter to a server and proves it there; goes back by itself when the proof fails, and on request.

desk = Desk(store, "main", vllm, os.environ, by="ann", now=time.time, sleep=time.sleep)
publish(desk, "bicycle-care-2", place); roll_back(desk); check(desk)

Ready is what the probe hears, not what a status says. What was live stays loaded until its successor is proven, and the
one before stays loaded behind it: the way back is one switch, and there is never nothing to answer. An adapter that
answers, but is live no more, is unloaded by the next publication: a web app may name it for half a minute yet.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.evaluation import Override
from recipes.job import Manifest
from recipes.serving import Deed, Place, Serving
from scripts import audit
from scripts.dry_load import Server, dry_load
from scripts.errors import LorryError, Problem, ProviderError, Refused, VerificationFailed
from scripts.evaluate import promotable
from scripts.export import export
from scripts.job_folder import file_below
from scripts.serving.client import Offer, Vllm
from scripts.serving.history import following, history, newest, require_idle, served_name
from scripts.serving.outcomes import complaint, counted
from scripts.serving.probe import Heard, listen, read_points
from scripts.store import Store, open_store

PAUSE_SECONDS = 2.0
WRONG_TRIES = 3
"An adapter that answers, but wrongly, is heard so often before it is given up."


@dataclass(frozen=True)
class Desk:
    """Where and by whom something is published."""

    store: Store
    place: str
    vllm: Vllm
    environment: Mapping[str, str]
    by: str
    now: Callable[[], float]
    sleep: Callable[[float], None]

    def model(self, job_id: str) -> str:
        """What the adapter of a job is called on the server."""
        return served_name(self.store, job_id)


def publish(
    desk: Desk, job_id: str, place: Place, *, override: str | None = None, canary: float | None = None
) -> Serving:
    """Makes the adapter live at the place, or its canary, once it is proven there.

    Raises Refused before anything is touched (no passing evaluation, another base, tensors that would not act),
    VerificationFailed when the server did not answer with this adapter: what was live is live again then.
    """
    known = promotable(desk.store, job_id, override=override, by=desk.by, now=desk.now())
    place = _of_this_base(place, known.manifest)
    states = history(desk.store, desk.place)
    before = states[-1] if states else None
    offer = _required_offer(desk, place)
    _carry(desk, job_id, place, offer)
    deed: Deed = "publish" if canary is None else "canary"
    begun = _step(desk, before, deed, job_id, "begun", place=place, live=before.live if before else None)
    _tell(desk, known.override, job_id)
    try:
        heard = _proven(desk, place, job_id)
    except LorryError as error:
        if begun.canary == job_id:  # its share goes back before it is unloaded
            begun = _step(desk, begun, deed, job_id, "begun", canary=None, canary_share=0.0)
        stays = _restored(desk, begun, job_id)
        _step(desk, begun, deed, job_id, "failed", sentence=f"{error}; {stays}"[:500])
        raise VerificationFailed(*error.problems, Problem(f"place {desk.place}", stays)) from None
    said = {"effect": heard.effect, "error": heard.error, "sentence": f"answers as trained, error {heard.error:.1%}"}
    if canary is not None:
        audit.record(desk.store, "promote", job_id, who=desk.by, now=desk.now(), note=f"canary at {desk.place}")
        return _step(desk, begun, deed, job_id, "done", canary=job_id, canary_share=canary, **said)
    earlier = tuple(dict.fromkeys(job for job in (begun.live, *begun.earlier) if job and job != job_id))
    done = _step(desk, begun, deed, job_id, "done", live=job_id, earlier=earlier, canary=None, canary_share=0.0, **said)
    audit.record(desk.store, "promote", job_id, who=desk.by, now=desk.now(), note=f"live at {desk.place}")
    _unload_old(desk, states, keep=(job_id, begun.canary, *earlier[:1]))
    return done


def roll_back(desk: Desk, reason: str = "asked for") -> Serving:
    """Makes the adapter that was live before live again, proven. Raises Refused when there was none."""
    before = newest(desk.store, desk.place)
    if not before.earlier:
        raise Refused(Problem(f"place {desk.place}", "no adapter was live there before", "publish another one"))
    to, *rest = before.earlier
    begun = _step(desk, before, "roll back", to, "begun", sentence=reason[:500])
    try:
        heard = _proven(desk, before.place, to)
    except LorryError as error:
        _step(desk, begun, "roll back", to, "failed", sentence=str(error)[:500])
        raise
    said = {"effect": heard.effect, "error": heard.error, "sentence": f"{reason[:400]}; was {before.live}"}
    done = _step(
        desk, begun, "roll back", to, "done", live=to, earlier=tuple(rest), canary=None, canary_share=0.0, **said
    )
    audit.record(desk.store, "roll back", to, who=desk.by, now=desk.now(), note=f"live at {desk.place}: {reason}")
    return done


def check(desk: Desk) -> Serving:
    """Hears the live adapter; loads it again where the server forgot it, goes back where that does not help.

    It also goes back from an adapter that answers as trained while the users' own chats fail. A canary of which
    either is true is withdrawn at once: nobody depends on it yet.

    Raises Conflict while somebody is at work there, VerificationFailed when neither adapter answers as trained, or
    when chats fail and going back would not help.
    """
    state = newest(desk.store, desk.place)
    if state.live is None and state.canary is None:
        raise Refused(Problem(f"place {desk.place}", "nothing is live there", "publish an adapter"))
    require_idle(desk.place, state, deed="reload", job_id=state.live, by=desk.by, at=desk.now())
    if state.canary and (reason := _heard(desk, state.place, state.canary)[1]):
        canary, state = state.canary, _withdrawn(desk, state, state.canary, reason)
        _unload_bad(desk, state, canary)
    if state.live is None or _heard(desk, state.place, state.live)[0]:
        return _as_users_say(desk, state)
    begun = _step(desk, state, "reload", state.live, "begun")
    try:
        heard = _proven(desk, state.place, state.live)
    except LorryError as error:
        failed = _step(desk, begun, "reload", state.live, "failed", sentence=str(error)[:500])
        if not failed.earlier:
            raise
        done = roll_back(desk, f"{state.live} does not answer as trained")
        _unload_bad(desk, done, state.live)
        return done
    said = {"effect": heard.effect, "error": heard.error, "sentence": "the server had forgotten it"}
    return _step(desk, begun, "reload", state.live, "done", **said)


def _as_users_say(desk: Desk, state: Serving) -> Serving:
    """Goes back where the users' own chats fail with one adapter: with two, the fault lies elsewhere.

    Raises VerificationFailed when they fail with the canary too, or with what was gone back to.
    """
    live, canary = (_complaint(desk, state, job) for job in (state.live, state.canary))
    if state.canary and canary and not live:
        return _withdrawn(desk, state, state.canary, canary)
    if not live:
        return state
    if canary or not state.earlier or _was_gone_back_to(desk, state):
        want = "no other adapter would help: look at the web app and its key, then publish another one"
        raise VerificationFailed(Problem(f"{state.live} at {desk.vllm.url}", live, want))
    return roll_back(desk, live)


def _was_gone_back_to(desk: Desk, state: Serving) -> bool:
    """Whether the live adapter is live by a way back, and not by its own publication."""
    done = [s for s in history(desk.store, desk.place) if s.outcome == "done" and s.job_id == s.live == state.live]
    return next((s.deed == "roll back" for s in reversed(done) if s.deed != "reload"), False)


def _withdrawn(desk: Desk, state: Serving, canary: str, reason: str) -> Serving:
    """The canary's share goes back to the live adapter."""
    sentence = f"withdrawn: {reason}"[:500]
    done = _step(desk, state, "roll back", canary, "done", canary=None, canary_share=0.0, sentence=sentence)
    audit.record(desk.store, "roll back", canary, who=desk.by, now=desk.now(), note=f"canary at {desk.place}: {reason}")
    return done


def _of_this_base(place: Place, manifest: Manifest) -> Place:
    """The place, which from its first adapter on keeps to the base that it was trained on. Raises Refused."""
    where, serves = f"job {manifest.job_id}", place.base_sha256 or manifest.base_sha256
    if manifest.base_model != place.base:
        got = f"an adapter of {manifest.base_model}, and this place serves {place.base}"
        raise Refused(Problem(where, got, "publish it where its own base is served"))
    if manifest.base_sha256 != serves:
        got = f"trained on other files of the base (sha256 {manifest.base_sha256[:12]}) than are served ({serves[:12]})"
        raise Refused(Problem(where, got, "train it on that revision; where the server has a new one, give --at again"))
    return place.model_copy(update={"base_sha256": serves})


def _required_offer(desk: Desk, place: Place) -> Offer:
    """What the server can do. Raises Refused where it takes no adapters, or serves another base."""
    offer = desk.vllm.offer()
    if offer.lora is False:
        want = (
            "start it with --enable-lora; on Runpod set ENABLE_LORA=true, elsewhere VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
        )
        raise Refused(Problem(desk.vllm.url, "it was started without LoRA", want))
    bases = [name for name, parent in desk.vllm.models().items() if parent is None]
    if place.base not in bases:
        got = f"it serves {', '.join(bases) or 'nothing'}, not {place.base}"
        raise Refused(Problem(desk.vllm.url, got, "name the base there with --served-model-name, letter by letter"))
    return offer


def _carry(desk: Desk, job_id: str, place: Place, offer: Offer) -> None:
    """Copies the adapter in the place's form, after a dry load; what is there already is not sent again."""
    server = Server(
        max_lora_rank=offer.max_lora_rank or place.max_lora_rank,
        max_loras=offer.max_loras,
        mixed_expert_formats=place.form == "peft",  # the local server reads fused experts, as PEFT does
        shared_experts=place.form == "shared",
        expert_gib=place.expert_gib or offer.gpu_gib,
    )
    with tempfile.TemporaryDirectory(prefix="lorry-serve-") as temporary:
        folder = Path(temporary) / "adapter"
        names = export(desk.store, job_id, place.form, folder, desk.environment)
        if problems := dry_load(folder, place.base, server):
            raise Refused(*problems)
        there = open_store(place.adapters)
        for name in names:
            there.put_file(folder / name, f"{desk.model(job_id)}/{name}")


def _proven(desk: Desk, place: Place, job_id: str) -> Heard:
    """Loads the adapter and waits until the server answers with it. Raises VerificationFailed, ProviderError."""
    if desk.model(job_id) in desk.vllm.models() and (heard := _heard(desk, place, job_id)[0]):
        return heard
    give_up = desk.now() + desk.vllm.ready_seconds
    desk.vllm.load(desk.model(job_id), f"{place.mounted.rstrip('/')}/{desk.model(job_id)}")
    wrong = 0
    while True:
        heard, sentence = _heard(desk, place, job_id)
        if heard:
            return heard
        wrong += not sentence.startswith(_SILENT)
        if wrong >= WRONG_TRIES or desk.now() > give_up:
            want = "the server's log says more; the adapter itself was proven when it was trained"
            raise VerificationFailed(Problem(f"{job_id} at {desk.vllm.url}", sentence, want))
        desk.sleep(PAUSE_SECONDS)


_SILENT = "no answer: "


def _heard(desk: Desk, place: Place, job_id: str) -> tuple[Heard | None, str]:
    """What the probe hears when it is the adapter; otherwise nothing, and a sentence."""
    with file_below(desk.store, f"{job_id}/probe.safetensors") as path:
        points = read_points(path)
    try:
        heard = listen(desk.vllm, place.base, desk.model(job_id), points)
    except ProviderError as error:
        return None, f"{_SILENT}{error}"
    return (None, heard.problem) if heard.problem else (heard, "")


def _complaint(desk: Desk, state: Serving, job_id: str | None) -> str | None:
    """What the users' own chats say against the adapter since the last deed at the place, whichever it was of.

    A deed may leave users without an answer for minutes, as when the workers of an endpoint are replaced.
    """
    return complaint(counted(desk.store, desk.place, job_id, state.at, desk.now())) if job_id else None


def _unload_bad(desk: Desk, state: Serving, job_id: str) -> None:
    """Unloads what does not answer as trained: a worker that starts with it may die."""
    if job_id not in (state.live, state.canary, *state.earlier):
        desk.vllm.unload(desk.model(job_id))


def _unload_old(desk: Desk, states: list[Serving], keep: tuple[str | None, ...]) -> None:
    """Unloads what the place ever had, but for `keep`."""
    old = {desk.model(state.job_id) for state in states if state.job_id not in keep}
    for name in sorted(old.intersection(desk.vllm.names())):
        desk.vllm.unload(name)


def _restored(desk: Desk, begun: Serving, job_id: str) -> str:
    """After a failed publication: the new adapter goes, what was live is heard, and loaded again where it must be."""
    try:
        _unload_bad(desk, begun, job_id)
        if begun.live and not _heard(desk, begun.place, begun.live)[0]:
            _proven(desk, begun.place, begun.live)
    except LorryError as error:
        return f"{begun.live or 'the base model'} does not answer either: {error}"
    return f"{begun.live} stays live" if begun.live else "nothing was live there"


def _tell(desk: Desk, override: Override | None, job_id: str) -> None:
    if override is not None:
        audit.record(desk.store, "override", job_id, who=desk.by, now=desk.now(), note=override.reason)


def _step(desk: Desk, before: Serving | None, deed: Deed, job_id: str, outcome: str, **changes: Any) -> Serving:
    said = {"deed": deed, "job_id": job_id, "by": desk.by, "at": desk.now(), "outcome": outcome}
    return following(desk.store, desk.place, before, **said, **changes)
