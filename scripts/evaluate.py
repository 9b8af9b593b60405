"""Whether an adapter is good enough to go live: measured against its base, held against the recipe's limits.

assessment = evaluate(store, "bicycle-care-1", Path("models"), os.environ, now=time.time())    # writes evaluation.json
promotable(store, "bicycle-care-1")                                # raises Refused without a passing evaluation
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from pydantic import ValidationError

from recipes.evaluation import Assessment, Judgement, Override, Scores, TextScore, general_questions, perplexity
from recipes.job import File, LaunchSpec, Manifest
from recipes.recipe import Evaluation
from scripts.adapter import MANIFEST
from scripts.errors import InputError, NotFound, Problem, Refused, VerificationFailed
from scripts.forget import RECORD as DATA_ERASED
from scripts.job_folder import read_job
from scripts.judge import Judge, judge_answers
from scripts.machine import trainer_environment, trains_on_cpu
from scripts.models import making_commands, recipe_folder, recipe_problem
from scripts.store import FileStore, Store

SCORES, ASSESSMENT, OVERRIDE = "scores.json", "evaluation.json", "override.json"
_INPUTS = ("launch.json", "result.json")


def evaluate(
    store: Store, job_id: str, models: Path, environment: Mapping[str, str], *, now: float, judge: Judge | None = None
) -> Assessment:
    """Measures where no measurement of this adapter is there, judges where a judge is given, writes evaluation.json.

    Raises NotFound for a job without an adapter, Refused where the base model is not on this machine, ProviderError
    when the judge fails, VerificationFailed when the measurement does.
    """
    spec, manifest = _finished(store, job_id)
    scores = read_scores(store, job_id)
    if scores is None or not _of_this(scores, manifest) or scores.general_sha256 != general_questions()[1]:
        scores = _measured(store, spec, models, environment)
    judgements: tuple[Judgement, ...] = ()
    if judge is not None:
        with httpx.Client(follow_redirects=False) as http:
            judgements = judge_answers(judge, scores.answers, http)
    assessment = assess(spec.recipe.evaluation, scores, judge.model if judge else None, judgements, now)
    store.write(f"{job_id}/{ASSESSMENT}", assessment.model_dump_json(indent=2).encode() + b"\n")
    return assessment


def assess(
    limits: Evaluation, scores: Scores, judge: str | None, judgements: Sequence[Judgement], now: float
) -> Assessment:
    """The scores held against the limits. Pure."""
    held_out, general = _means(scores.held_out), _means(scores.general)
    assessment = Assessment(
        job_id=scores.job_id,
        passed=False,
        reasons=(),
        limits=limits,
        adapter_sha256=scores.adapter_sha256,
        base_sha256=scores.base_sha256,
        held_out_base=held_out[0],
        held_out_adapter=held_out[1],
        general_base=general[0],
        general_adapter=general[1],
        judge=judge,
        judgements=tuple(judgements),
        at=now,
    )
    reasons = tuple(_reasons(limits, scores, assessment))
    return assessment.model_copy(update={"passed": not reasons, "reasons": reasons})


@dataclass(frozen=True)
class Promotable:
    """An adapter that may go live: its manifest, and the override where it did not pass by itself."""

    manifest: Manifest
    override: Override | None = None


def promotable(store: Store, job_id: str, *, override: str | None = None, by: str = "", now: float = 0.0) -> Promotable:
    """Whether the adapter may go live. `override`: the reason to do it although nothing says that it is good.

    Raises NotFound for a job without an adapter, Refused without a passing evaluation of this very adapter, InputError
    for an override without a reason.
    """
    spec, manifest = _finished(store, job_id)
    failed = _against(store, spec, manifest)
    if not failed:
        return Promotable(manifest)
    if override is None:
        want = f"`lorry evaluate {job_id}`, train again, or give a reason with --override"
        raise Refused(*(Problem(f"job {job_id}", reason, want) for reason in failed))
    if len(override.strip()) < 10:
        raise InputError(Problem("--override", repr(override[:80]), "the reason, in a few words; it is recorded"))
    record = Override(
        job_id=job_id,
        by=by,
        reason=override.strip()[:1000],
        at=now,
        adapter_sha256=manifest.files,
        failed=tuple(failed),
    )
    store.write(f"{job_id}/{OVERRIDE}", record.model_dump_json(indent=2).encode() + b"\n")
    return Promotable(manifest, record)


def read_scores(store: Store, job_id: str) -> Scores | None:
    """The measurement of a job, if any; one that cannot be read is none."""
    return _read(store, f"{job_id}/{SCORES}", Scores)


def read_assessment(store: Store, job_id: str) -> Assessment | None:
    """The evaluation of a job, if any; one that cannot be read is none."""
    return _read(store, f"{job_id}/{ASSESSMENT}", Assessment)


def _finished(store: Store, job_id: str) -> tuple[LaunchSpec, Manifest]:
    files = read_job(store, job_id)
    if files.launch is None or files.manifest is None:
        want = "wait for the run to end; `lorry show` says how it stands"
        raise NotFound(Problem(f"{store.url}/{job_id}", "no finished adapter", want))
    return files.launch, files.manifest


def _against(store: Store, spec: LaunchSpec, manifest: Manifest) -> list[str]:
    """What speaks against the adapter: no evaluation, one of another adapter or other limits, one that failed."""
    assessment = read_assessment(store, spec.job_id)
    if assessment is None:
        return ["not evaluated"]
    if assessment.adapter_sha256 != manifest.files or assessment.base_sha256 != manifest.base_sha256:
        return ["the evaluation is of another adapter"]
    if assessment.limits != spec.recipe.evaluation:
        return ["the evaluation used other limits than the recipe's"]
    return [] if assessment.passed else list(assessment.reasons) or ["it did not pass its evaluation"]


def _reasons(limits: Evaluation, scores: Scores, of: Assessment) -> list[str]:
    reasons = []
    gain, rise = of.held_out_base - of.held_out_adapter, of.general_adapter - of.general_base
    if not scores.held_out:
        reasons.append("no conversation was held out; set data.validation_fraction, or override with a reason")
    elif not gain > limits.min_gain:
        fell = f"held-out loss {of.held_out_base:.4f} to {of.held_out_adapter:.4f}"
        reasons.append(f"{fell}: it must fall by more than {limits.min_gain:g}")
    if not rise <= limits.max_forgetting:
        rose = f"loss on general questions {of.general_base:.4f} to {of.general_adapter:.4f}"
        reasons.append(f"{rose}: it may rise by at most {limits.max_forgetting:g}")
    if limits.min_win_rate is not None:
        rate = of.win_rate
        if rate is None:
            reasons.append("no judge was asked, but evaluation.min_win_rate is set; name one with --judge")
        elif rate < limits.min_win_rate:
            reasons.append(f"win rate {rate:.2f} over {len(of.judgements)} questions, below {limits.min_win_rate:g}")
    return reasons


def _means(scores: Sequence[TextScore]) -> tuple[float, float]:
    """Loss per answer token, base and adapter; (0, 0) without texts."""
    tokens = sum(score.tokens for score in scores) or 1
    return sum(score.base for score in scores) / tokens, sum(score.adapter for score in scores) / tokens


def _measured(store: Store, spec: LaunchSpec, models: Path, environment: Mapping[str, str]) -> Scores:
    """Runs trainer.evaluate on the job folder, or on a copy of what it needs where the job lies in a bucket."""
    if store.read(f"{spec.job_id}/{DATA_ERASED}") is not None:
        got = "never measured, and its training set was erased as its recipe asks"
        raise Refused(Problem(f"job {spec.job_id}", got, "train again, or put it live with --override REASON"))
    model = _base_model(spec, models)
    with tempfile.TemporaryDirectory(prefix="lorry-evaluate-") as temporary:
        job = store.root / spec.job_id if isinstance(store, FileStore) else Path(temporary)
        if not isinstance(store, FileStore):
            for name in (*_INPUTS, "data/valid.jsonl", *_adapter_files(store, spec.job_id)):
                if name != "data/valid.jsonl" or spec.valid_examples:
                    store.get_file(f"{spec.job_id}/{name}", job / name)
        words = ("--job", str(job), "--model", str(model))
        done = _python(["-m", "trainer.evaluate", *words], spec, environment)
        if done.returncode != 0:
            said = (done.stderr.strip().splitlines() or ["no word"])[-1]
            raise VerificationFailed(Problem(f"job {spec.job_id}", f"it could not be measured: {said}"))
        if not isinstance(store, FileStore):
            store.put_file(job / SCORES, f"{spec.job_id}/{SCORES}")
    scores = read_scores(store, spec.job_id)
    assert scores is not None
    return scores


def _base_model(spec: LaunchSpec, models: Path) -> Path:
    models.mkdir(parents=True, exist_ok=True)
    for command in making_commands(models, spec.recipe):
        subprocess.run(command, check=True, capture_output=True)
    if problem := recipe_problem(models, spec.recipe):
        want = f"run it on a machine that holds {spec.recipe.base.id}; the proof of a job measures it as well"
        raise Refused(Problem("evaluate", f"no measurement of this adapter yet, and {problem}", want))
    return recipe_folder(models, spec.recipe)


def _python(words: Sequence[str], spec: LaunchSpec, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    seen = trainer_environment(environment, trains_on_cpu(spec))
    return subprocess.run([sys.executable, *words], env=seen, capture_output=True, text=True, check=False)


def _adapter_files(store: Store, job_id: str) -> list[str]:
    return [key.removeprefix(f"{job_id}/") for key in store.keys(f"{job_id}/adapter") if not key.endswith(MANIFEST)]


def _of_this(scores: Scores, manifest: Manifest) -> bool:
    return scores.adapter_sha256 == manifest.files and scores.base_sha256 == manifest.base_sha256


def _read(store: Store, key: str, model: type[File]) -> File | None:
    data = store.read(key)
    try:
        return None if data is None else model.model_validate_json(data)
    except ValidationError:
        return None


def summary(assessment: Assessment) -> list[tuple[str, str]]:
    """The evaluation as lines for a person: (what, numbers)."""
    a = assessment
    lines = [
        ("held-out loss", _change(a.held_out_base, a.held_out_adapter)),
        ("perplexity", f"{perplexity(a.held_out_base):.2f} before, {perplexity(a.held_out_adapter):.2f} after"),
        ("general loss", _change(a.general_base, a.general_adapter)),
    ]
    if a.win_rate is not None:
        undecided = sum(not j.consistent for j in a.judgements)
        lines.append(("win rate", f"{a.win_rate:.2f} over {len(a.judgements)}, {undecided} undecided ({a.judge})"))
    return lines + [("", reason) for reason in a.reasons]


def _change(before: float, after: float) -> str:
    return f"{before:.4f} before, {after:.4f} after"
