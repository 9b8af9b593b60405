"""Measures an adapter against its base: losses on held-out and on general texts, and answers side by side.

python -m trainer.evaluate --job DIR --model DIR     # reads launch.json, result.json, data/, adapter/

The proof measures too, while it has the model in memory: nobody loads 160 GB twice.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from recipes.catalog import load_catalog
from recipes.causes import EXIT_CODES
from recipes.chat import Message, tokenise
from recipes.evaluation import Answer, Scores, TextScore, general_questions
from recipes.job import LaunchSpec, Result, read_record, write_record
from trainer.adapter import load_adapter, quiet_transformers
from trainer.base_files import BaseFiles
from trainer.batches import padded
from trainer.cross_entropy import IGNORED
from trainer.data import ChatTokens, Example, read_examples
from trainer.failures import TrainingStopped, explain
from trainer.targets import base_only

MOST_HELD_OUT = 64
MOST_ANSWERS = 8
ANSWER_TOKENS = 48
LIMIT_SECONDS = 900.0
"After this long no further text is scored: a rented machine waits for the answer."
ROWS = 512
"Answer positions whose logits are held at once: 512 x 151,936 x 4 bytes are 0.3 GB."
TOGETHER = 8
"General questions are short: so many are scored in one pass."


def measure(model: Any, job: Path, model_folder: Path, spec: LaunchSpec, result: Result) -> Scores:
    """The scores of a loaded adapter. Raises TrainingStopped when the held-out set is not the one of the job."""
    started = time.monotonic()
    chat = ChatTokens(model_folder)
    questions, general_sha256 = general_questions()
    path, limit = job / "data" / "valid.jsonl", spec.recipe.data.max_tokens
    count = spec.valid_examples
    held_out = read_examples(path, spec.valid_sha256, count, chat, limit) if count else []
    chosen = spread(held_out, MOST_HELD_OUT)
    # No text of a set that shall be erased is copied.
    shown = spread(held_out, MOST_ANSWERS) if spec.recipe.data.after_training == "keep" else []
    general = [_general(number, question, answer, chat) for number, (question, answer) in enumerate(questions.items())]
    give_up = started + LIMIT_SECONDS
    general_scores = _general_scores(model, general, chat.pad_id)
    held_out_scores = _held_out(model, chosen, give_up)
    return Scores(
        job_id=spec.job_id,
        adapter_sha256=result.adapter_sha256,
        base_sha256=result.base_sha256,
        general_sha256=general_sha256,
        held_out=held_out_scores,
        held_out_total=len(held_out),
        general=general_scores,
        answers=_answers(model, path, shown, chat) if shown else (),
        answer_tokens=ANSWER_TOKENS,
        seconds=time.monotonic() - started,
    )


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many items, taken evenly from first to last."""
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def summed_nll(model: Any, example: Example, device: Any) -> float:
    """Summed negative log-likelihood (nats) of the trained tokens of one conversation, without padding."""
    ids = torch.tensor([list(example.ids)], device=device)
    predicted = example.predicted
    total = 0.0
    with torch.no_grad():
        for at in range(0, len(predicted), ROWS):
            part = torch.tensor(predicted[at : at + ROWS], device=device)
            keep = {"use_cache": False, "logits_to_keep": part - 1}
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **keep).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits.float(), ids[0, part], reduction="sum"))
    return total


def _held_out(model: Any, examples: Sequence[Example], give_up: float) -> tuple[TextScore, ...]:
    device = next(model.parameters()).device
    scores: list[TextScore] = []
    for example in examples:
        if scores and time.monotonic() > give_up:
            break
        adapter = summed_nll(model, example, device)
        with base_only(model):
            base = summed_nll(model, example, device)
        scores.append(TextScore(name=example.id, tokens=len(example.predicted), base=base, adapter=adapter))
    return tuple(scores)


def _general_scores(model: Any, examples: Sequence[Example], pad_id: int) -> tuple[TextScore, ...]:
    adapter = _padded_nll(model, examples, pad_id)
    with base_only(model):
        base = _padded_nll(model, examples, pad_id)
    return tuple(
        TextScore(name=example.id, tokens=len(example.predicted), base=before, adapter=after)
        for example, before, after in zip(examples, base, adapter, strict=True)
    )


def _padded_nll(model: Any, examples: Sequence[Example], pad_id: int) -> list[float]:
    """Summed negative log-likelihood (nats) of each short text, several to a pass."""
    device, out = next(model.parameters()).device, []
    for at in range(0, len(examples), TOGETHER):
        batch = padded(examples[at : at + TOGETHER], pad_id, device)
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        rows = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), batch["labels"][:, 1:], ignore_index=IGNORED, reduction="none"
        )
        out += rows.sum(dim=1).tolist()
    return out


def _general(number: int, question: str, answer: str, chat: ChatTokens) -> Example:
    messages: list[Message] = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer, "trained": True},
    ]
    tokens = tokenise(messages, chat.render, chat.encode, chat.end_ids)
    return Example(question, number + 1, array("i", tokens.ids), bytes(tokens.trained))


def _answers(model: Any, path: Path, examples: Sequence[Example], chat: ChatTokens) -> tuple[Answer, ...]:
    """Both models' greedy answers to the last trained turn of each conversation, made together."""
    wanted = {example.id for example in examples}
    rows = [row for line in path.read_text(encoding="utf-8").splitlines() if (row := json.loads(line))["id"] in wanted]
    turns = [max(i for i, m in enumerate(row["messages"]) if m.get("trained")) for row in rows]
    prompts = [
        chat.encode(chat.render(row["messages"][:turn], True, row.get("tools")))[0]
        for row, turn in zip(rows, turns, strict=True)
    ]
    adapter = _generated(model, prompts, chat)
    with base_only(model):
        base = _generated(model, prompts, chat)
    return tuple(
        Answer(
            name=str(row["id"]),
            question=str(row["messages"][turn - 1].get("content") or "") if turn else "",
            wanted=str(row["messages"][turn].get("content") or ""),
            base=base[i],
            adapter=adapter[i],
        )
        for i, (row, turn) in enumerate(zip(rows, turns, strict=True))
    )


def _generated(model: Any, prompts: Sequence[list[int]], chat: ChatTokens) -> list[str]:
    """Greedy continuations, at most ANSWER_TOKENS long. Padded on the left: the next token follows the last column."""
    device = next(model.parameters()).device
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[chat.pad_id] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=ANSWER_TOKENS,
            eos_token_id=sorted(chat.end_ids),
            pad_token_id=chat.pad_id,
        )
    return [_text(row[width:].tolist(), chat) for row in out]


def _text(ids: list[int], chat: ChatTokens) -> str:
    """The answer up to its end of turn."""
    end = next((i for i, token in enumerate(ids) if token in chat.end_ids), len(ids))
    return chat.decode(ids[:end]).strip()


def main() -> int:
    """Exit code 0, or EXIT_CODES of what went wrong, said in one line."""
    parser = argparse.ArgumentParser(description="Measures the adapter of a job folder against its base model.")
    parser.add_argument("--job", type=Path, required=True, help="the job folder")
    parser.add_argument("--model", type=Path, required=True, help="the base model's folder")
    arguments = parser.parse_args()
    job, folder = arguments.job, arguments.model
    quiet_transformers()
    try:
        spec, result = read_record(LaunchSpec, job / "launch.json"), read_record(Result, job / "result.json")
        if spec is None or result is None or result.outcome != "completed":
            raise TrainingStopped("no_effect", f"{job}: no finished training to evaluate")
        if BaseFiles(folder).sha256() != result.base_sha256:
            raise TrainingStopped("bad_base_model", f"{folder}: not the base model the adapter was trained on")
        catalog = load_catalog()
        family = catalog.family_of(spec.recipe.base.id)
        model, _ = load_adapter(folder, job / "adapter", family, spec.recipe)
        scores = measure(model, job, folder, spec, result)
    except Exception as error:
        cause, sentence = explain(error)
        print(sentence, file=sys.stderr, flush=True)
        return EXIT_CODES[cause]
    write_record(job / "scores.json", scores)
    print(f"measured {len(scores.held_out)} conversations and {len(scores.general)} general questions", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
