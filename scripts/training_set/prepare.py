"""The whole preparation: read and check, merge, drop duplicates, count, split, write."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from recipes.errors import InputError, LorryError, Problem
from recipes.job import write_record
from recipes.preparation import TokenCounts, TrainingSetReport
from recipes.recipe import Data
from scripts.tokenizer import ChatTokenizer
from scripts.training_set import convert
from scripts.training_set.container import Container, open_container, read_row
from scripts.training_set.content import beginnings
from scripts.training_set.findings import Findings, Unusable
from scripts.training_set.forms import Form, check_keys, decoded, recognise
from scripts.training_set.index import Index
from scripts.training_set.merge import Example, Pair, merged, per_answer, per_pair, without_repetitions
from scripts.training_set.notes import notes
from scripts.training_set.reasoning import holds_thought
from scripts.training_set.rows import PairRow
from scripts.training_set.split import held_out_groups
from scripts.training_set.tokens import Counter

READ_BYTES = 2**20  # with Python's default of 8 KiB, reading alone takes half as long as decoding


def prepare(
    source: Path, out: Path, data: Data, seed: int, tokenizer: ChatTokenizer | None = None
) -> TrainingSetReport:
    """Writes out/train.jsonl, out/valid.jsonl and, last, out/report.json; returns the report.

    The same file, settings and seed give the same bytes. Nothing is ever truncated. Raises InputError with every
    problem found (the first 20 and a count) when the set cannot be used, LorryError when `out` cannot be written; then
    nothing is written.
    """
    if not source.is_file():
        raise InputError(Problem(str(source), "no such file", "the path of a training set"))
    try:
        file = BufferedReader(FileIO(source), READ_BYTES)
    except OSError as error:
        raise InputError(Problem(str(source), f"cannot be read ({error.strerror})", "a readable file")) from None
    try:
        out.mkdir(parents=True, exist_ok=True)
        with file, tempfile.TemporaryDirectory(prefix=".preparing-", dir=out) as folder:
            job = _Preparation(source, file, Path(folder), data, seed, Counter(tokenizer))
            try:
                report = job.run()
            finally:
                job.index.close()
            for name in ("train.jsonl", "valid.jsonl"):
                os.replace(job.folder / name, out / name)
        write_record(out / "report.json", report)
    except (OSError, sqlite3.OperationalError) as error:
        want = "a writable folder with room for three times the training set"
        raise LorryError(Problem(str(out), f"cannot be written ({error})", want)) from None
    return report


@dataclass
class _Preparation:
    """One run: what it was given, and what is counted on the way."""

    source: Path
    file: BufferedReader[FileIO]
    folder: Path
    data: Data
    seed: int
    counter: Counter
    rows: int = 0
    usable: int = 0
    merged: int = 0
    per_pair: int = 0
    duplicates: int = 0
    thoughts: int = 0
    header: list[int] = field(default_factory=list)
    systems: set[str] = field(default_factory=set)
    "At most two system prompts: enough to tell whether there is more than one."

    def __post_init__(self) -> None:
        self.findings = Findings(self.source.name)
        self.index = Index(self.folder)

    def run(self) -> TrainingSetReport:
        """Leaves train.jsonl and valid.jsonl in the folder."""
        container = open_container(self.source, self.file)
        form = recognise(container.rows(lambda raw, error: None), self.source.name)
        self._index_rows(container, form)
        with (self.folder / "examples.jsonl").open("wb") as staged:
            for conversation, name, example in self._examples(form):
                self._stage(conversation, name, example, staged)
        if self.findings.problem_count:
            raise self.findings.as_error()
        self.index.link()
        conversations = self.index.count_conversations()
        if not conversations:
            raise InputError(self._nothing_usable())
        self.index.hold_out(held_out_groups(self.index.groups(self.seed), conversations, self.data.validation_fraction))
        train, valid = self._write_sides()
        return self._report(f"{form.name}, {container.shape}", conversations, train, valid)

    def _index_rows(self, container: Container, form: Form) -> None:
        """First pass: checks every row, and indexes those with something to learn."""
        for raw, row in decoded(container.rows(self.findings.refuse), form, self.findings, self.header):
            self.rows += 1
            conversation = convert.conversation_name(row) or raw.conversation
            turn = 0
            try:
                check_keys(raw.data, row, form)
                if isinstance(row, PairRow):
                    turn = max(0, min(row.turn_number or 0, 2**31))
                    if conversation is None:
                        wanted = "the id of its conversation, since pairs of one conversation contain each other"
                        raise Unusable("no key 'conversation_id'", wanted)
                usable = self._converted(row, raw.line, self.findings) is not None
            except Unusable as error:
                self.findings.refuse(raw, error)
                continue
            if usable:
                self.usable += 1
                name = conversation or raw.label or f"line-{raw.line}"
                self.index.add_row(name, conversation, turn, raw.line, raw.offset, len(raw.data))

    def _examples(self, form: Form) -> Iterator[tuple[int, str, Example]]:
        """Second pass: (conversation, id, example), conversation by conversation."""
        for conversation, name in self.index.conversations():
            examples = self._of_pairs(conversation, form) if form.row is PairRow else self._of_rows(conversation, form)
            for number, example in enumerate(examples, 1):
                yield conversation, name if number == 1 else f"{name}/{number}", example

    def _of_pairs(self, conversation: int, form: Form) -> Iterator[Example]:
        repetitions = 0

        def pairs() -> Iterator[Pair]:
            nonlocal repetitions
            repetitions = 0
            for pair, repeated in without_repetitions(self._load(conversation, form)):
                repetitions += repeated
                if not repeated:
                    yield pair

        whole = merged(pairs())
        answers = 2 if whole is None else sum("trained" in message for message in whole.messages)
        if whole is None or self.counter.splits_answers:
            self.per_pair += answers > 1
            yield from per_pair(pairs())
        else:
            self.merged += answers > 1
            yield whole
        self.duplicates += repetitions

    def _of_rows(self, conversation: int, form: Form) -> Iterator[Example]:
        for example in self._load(conversation, form):
            if self.counter.splits_answers:
                yield from per_answer(example)
            else:
                yield example

    def _load(self, conversation: int, form: Form) -> Iterator[Any]:
        """The rows of a conversation again, converted; what they hold was checked and noted in the first pass."""
        decode = msgspec.json.Decoder(form.row).decode
        unheard = Findings(self.source.name)
        for line, offset, length in self.index.rows(conversation):
            yield self._converted(decode(read_row(self.file, offset, length)), line, unheard)

    def _converted(self, row: Any, line: int, findings: Findings) -> Pair | Example | None:
        if isinstance(row, PairRow):
            return convert.to_pair(row, line, findings)
        return convert.to_example(row, line, findings)

    def _stage(self, conversation: int, name: str, example: Example, staged: BinaryIO) -> None:
        """Counts the example and keeps it, unless it is too long or stands there already."""
        try:
            count = self.counter.count(example)
        except Unusable as error:
            self.findings.refuse_line(example.line, error)
            return
        limit = self.data.max_tokens
        if count.tokens > limit:
            if self.data.too_long == "skip":
                self.findings.skip(f"longer than {limit} tokens", example.line)
                return
            about = "" if self.counter.exact else "about "
            want = f"at most {limit}: raise data.max_tokens, or set data.too_long to skip"
            self.findings.refuse_line(example.line, Unusable(f"'{name}' has {about}{count.tokens} tokens", want))
            return
        if self.counter.holds_control_tokens(example):
            self.findings.note(convert.CONTROL, example.line)
        line = {"id": name, "line": example.line, "messages": example.messages}
        data = msgspec.json.encode(line | ({"tools": example.tools} if example.tools else {})) + b"\n"
        if self.index.add_example(conversation, name, beginnings(example), len(data), count):
            staged.write(data)
            self.thoughts += any(holds_thought(message) for message in example.messages)
            system = [m["content"] for m in example.messages if m["role"] == "system"] or [""]
            if len(self.systems) < 2:
                self.systems.add(system[0])
        else:
            self.duplicates += 1

    def _nothing_usable(self) -> Problem:
        reasons = "; ".join(f"{s.count} left out: {s.reason}" for s in self.findings.skipped())
        return Problem(self.source.name, f"no usable example ({reasons or 'no rows'})", "at least one with an answer")

    def _write_sides(self) -> tuple[str, str]:
        """Writes both files; returns their SHA-256."""
        hashes = (hashlib.sha256(), hashlib.sha256())
        with (
            (self.folder / "examples.jsonl").open("rb") as staged,
            (self.folder / "train.jsonl").open("wb") as train,
            (self.folder / "valid.jsonl").open("wb") as valid,
        ):
            for length, held_out in self.index.lengths():
                data = staged.read(length)
                (valid if held_out else train).write(data)
                hashes[held_out].update(data)
        return hashes[0].hexdigest(), hashes[1].hexdigest()

    def _report(self, form: str, conversations: int, train: str, valid: str) -> TrainingSetReport:
        self.file.seek(0)
        source_sha256 = hashlib.file_digest(self.file, "sha256").hexdigest()
        trained, held_out = self.index.totals(held_out=False), self.index.totals(held_out=True)
        longest, longest_id = self.index.longest()
        report = TrainingSetReport(
            source=self.source.name,
            source_sha256=source_sha256,
            source_bytes=self.file.tell(),
            form=form,
            rows=self.rows,
            usable_rows=self.usable,
            skipped=self.findings.skipped(),
            conversations=conversations,
            merged=self.merged,
            per_pair=self.per_pair,
            duplicates=self.duplicates,
            train_examples=trained.examples,
            valid_examples=held_out.examples,
            train_sha256=train,
            valid_sha256=valid,
            thoughts=self.thoughts,
            tokens=TokenCounts(
                exact=self.counter.exact,
                tokenizer=self.counter.name,
                train=trained.tokens,
                valid=held_out.tokens,
                trained=trained.trained,
                longest=longest,
                longest_id=longest_id,
            ),
        )
        one_system = len(self.systems) == 1 and self.systems != {""}
        facts = notes(report, self.findings, self.data, self.header, held_out.conversations, one_system)
        return report.model_copy(update={"notes": facts})
