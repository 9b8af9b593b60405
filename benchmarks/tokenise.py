"""JSONL to token ids and exact masks: the trainer's fast way against the call TRL makes for every row, same run.

python -m benchmarks.tokenise

The peer is transformers' apply_chat_template with the assistant's mask, row by row: what TRL runs inside datasets.map,
whose own cost is left out. The text is the standard library's docstrings in conversations of one to three turns, with
a BPE of 20,000 tokens learned from it. CPU seconds of one thread, the least of interleaved rounds.
"""

from __future__ import annotations

import ast
import json
import os
import random
import shutil
import tempfile
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import trainers

from trainer.data import ChatTokens, proven_fast
from trainer.smoke_tokenizer import SPECIAL, build_tokenizer

SMOKE = Path(__file__).parent.parent / "recipes" / "smoke" / "model"
VOCABULARY, ROWS, ROUNDS = 20_000, 3000, 5


def run() -> dict[str, float]:
    """Both keys; prints the table."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory(prefix="lorry-benchmark-") as folder:
        texts = docstrings()
        chat = ChatTokens(make_tokenizer(Path(folder) / "model", texts))
        path = Path(folder) / "train.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(texts)), encoding="utf-8")
        assert proven_fast(path, ROWS, chat) is not None
        lines = path.read_bytes().splitlines()
        ways = {
            "peer": lambda: [peer(chat, line) for line in lines],
            "fast": lambda: [fast(chat, line) for line in lines],
        }
        seconds, made = dict.fromkeys(ways, float("inf")), {}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                made[name], taken = timed(way)
                seconds[name] = min(seconds[name], taken)
        megabytes = path.stat().st_size / 1e6
    for name, taken in seconds.items():
        print(f"{name:<6}{megabytes / taken:8.1f} MB/s")
    same = (
        sum(
            (list(ids), list(mask)) == (theirs["input_ids"], theirs["assistant_masks"])
            for theirs, (ids, mask) in zip(made["peer"], made["fast"], strict=True)
        )
        / ROWS
    )
    return {"tokenise_speedup": seconds["peer"] / seconds["fast"], "tokenise_identical": same}


def docstrings() -> list[str]:
    """Those of the standard library, at least 80 characters long."""
    found = []
    for path in sorted(Path(ast.__file__).parent.rglob("*.py")):
        if "site-packages" in path.parts or "test" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        nodes = (n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef)))
        found += [text for node in nodes if len(text := ast.get_docstring(node) or "") >= 80]
    return found


def make_tokenizer(folder: Path, texts: list[str]) -> Path:
    """The smoke model's tokenizer files with a vocabulary of a real size."""
    shutil.copytree(SMOKE, folder)
    tokenizer = build_tokenizer()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def rows(texts: list[str]) -> list[dict[str, Any]]:
    """Canonical examples: short questions, longer answers."""
    pick = random.Random(1)
    made = []
    for number in range(ROWS):
        messages: list[dict[str, Any]] = []
        for _ in range(pick.randint(1, 3)):
            messages.append({"role": "user", "content": pick.choice(texts)[:300].strip()})
            messages.append({"role": "assistant", "content": pick.choice(texts)[:2000].strip(), "trained": True})
        made.append({"id": str(number), "line": number, "messages": messages})
    return made


def peer(chat: ChatTokens, line: bytes) -> Any:
    """What TRL does with a row."""
    messages = [{"role": m["role"], "content": m["content"]} for m in json.loads(line)["messages"]]
    return chat.tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)


def fast(chat: ChatTokens, line: bytes) -> tuple[array[int], bytes]:
    """What the trainer does with a row."""
    assert chat.fast is not None
    made = chat.fast.tokens(json.loads(line)["messages"])
    assert made is not None
    return made


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and its CPU seconds."""
    begin = time.process_time()
    made = work()
    return made, time.process_time() - begin


if __name__ == "__main__":
    print(run())
