"""Token ids, masks and batches: what is trained is what the assistant said, and nothing leaks between rows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.catalog import load_catalog
from recipes.chat import marked, tokenise
from trainer.base_files import loading
from trainer.data import ChatTokens, Example, read_examples
from trainer.failures import TrainingStopped
from trainer.smoke_tokenizer import build_tokenizer

LOADING = loading(load_catalog().families["qwen3_next"])


@pytest.fixture(scope="module")
def chat(smoke_model: Path) -> ChatTokens:
    return ChatTokens(smoke_model)


@pytest.fixture(scope="module")
def model(smoke_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smoke_model, dtype=torch.float32, **LOADING)[0].eval()


def write(path: Path, rows: list[Any]) -> tuple[Path, str, int]:
    """A .jsonl file, its SHA-256 and its number of rows."""
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path, hashlib.sha256(text.encode()).hexdigest(), len(rows)


def row(*messages: tuple[str, str], **fields: Any) -> dict[str, Any]:
    """A canonical example; assistant messages are trained."""
    said = [{"role": r, "content": c} | ({"trained": True} if r == "assistant" else {}) for r, c in messages]
    return {"id": "c1", "line": 7, "messages": said} | fields


def test_exactly_the_assistant_texts_and_their_end_of_turn_are_trained(
    chat: ChatTokens, jobs: Any, tmp_path: Path
) -> None:
    rows = jobs.conversations(12)
    examples = read_examples(*write(tmp_path / "train.jsonl", rows), chat, 1024)
    for example, source in zip(examples, rows, strict=True):
        pieces = [t for t, trained in _pieces(example, chat) if trained]
        assert pieces == [m["content"] + "<|im_end|>" for m in source["messages"] if m.get("trained")]


def test_masks_agree_with_the_generation_block_of_the_template(chat: ChatTokens, smoke_model: Path, jobs: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smoke_model)
    for source in jobs.conversations(6):
        ours = tokenise(source["messages"], chat.render, chat.encode, chat.end_ids)
        theirs = tokenizer.apply_chat_template(source["messages"], return_assistant_tokens_mask=True, return_dict=True)
        assert ours.ids == theirs["input_ids"]
        assert [int(t) for t in ours.trained] == theirs["assistant_masks"]
        assert any(ours.trained), "a mask of zeros trains nothing"


def test_untrained_assistant_turns_carry_no_loss(chat: ChatTokens, tmp_path: Path) -> None:
    source = row(("user", "one"), ("assistant", "skip me"), ("user", "two"), ("assistant", "train me"))
    del source["messages"][1]["trained"]
    (example,) = read_examples(*write(tmp_path / "t.jsonl", [source]), chat, 1024)
    assert [text for text, trained in _pieces(example, chat) if trained] == ["train me<|im_end|>"]


def test_tools_and_calls_are_rendered_and_the_call_is_trained(chat: ChatTokens, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "book", "arguments": {"day": "Monday"}}}
    source = row(("user", "Book a repair."), tools=[{"type": "function", "function": {"name": "book"}}])
    source["messages"].append({"role": "assistant", "content": None, "tool_calls": [call], "trained": True})
    (example,) = read_examples(*write(tmp_path / "t.jsonl", [source]), chat, 1024)
    (trained,) = [text for text, is_trained in _pieces(example, chat) if is_trained]
    assert trained == '<tool_call>\n{"name": "book", "arguments": {"day": "Monday"}}\n</tool_call><|im_end|>'
    assert '{"type": "function", "function": {"name": "book"}}' in chat.decode(list(example.ids))


LONG = row(("user", "word " * 600), ("assistant", "y"), id="long")


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (row(("user", "x")), r"line 2: it has no assistant message to train on"),
        (LONG, r"line 2: example 'long' has \d+ tokens; data.max_tokens is 512"),
        ("{broken", r"line 2: .*"),
        ({"id": "c1", "line": 1}, r"line 2: field 'messages' is missing"),
    ],
)
def test_a_row_that_cannot_be_trained_is_named(chat: ChatTokens, tmp_path: Path, bad: Any, sentence: str) -> None:
    path, sha256, count = write(tmp_path / "train.jsonl", [row(("user", "x"), ("assistant", "y")), bad])
    with pytest.raises(TrainingStopped, match=rf"train\.jsonl: {sentence}") as refused:
        read_examples(path, sha256, count, chat, 512)
    assert refused.value.cause == "bad_data"


def test_other_bytes_or_another_number_of_rows_than_launched_are_refused(chat: ChatTokens, tmp_path: Path) -> None:
    path, sha256, count = write(tmp_path / "train.jsonl", [row(("user", "x"), ("assistant", "y"))])
    with pytest.raises(TrainingStopped, match=r"1 examples, launch\.json says 2"):
        read_examples(path, sha256, count + 1, chat, 512)
    path.write_bytes(path.read_bytes().replace(b"x", b"z"))
    with pytest.raises(TrainingStopped, match=r"its SHA-256 is not the one of launch\.json"):
        read_examples(path, sha256, count, chat, 512)
    with pytest.raises(TrainingStopped, match="missing"):
        read_examples(tmp_path / "valid.jsonl", sha256, count, chat, 512)


def test_a_template_that_alters_what_the_assistant_said_is_refused(smoke_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in smoke_model.iterdir():
        (folder / file.name).symlink_to(file)
    template = (smoke_model / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").write_text(
        template.replace("{{- content }}", "{{- content | upper }}"), encoding="utf-8"
    )
    written = write(tmp_path / "train.jsonl", [row(("user", "x"), ("assistant", "hello"))])
    with pytest.raises(TrainingStopped, match=r"the mask marks 'HELLO<\|im_end\|>' instead of 'hello'"):
        read_examples(*written, ChatTokens(folder), 512)


def test_the_models_tokenizer_and_the_plain_tokenizer_file_agree(chat: ChatTokens, smoke_model: Path) -> None:
    plain = Tokenizer.from_file(str(smoke_model / "tokenizer.json"))
    text = "<|im_start|>user\nMy cha\u0131n e\u0301 \U0001f6b2 costs 12 euros.<|im_end|>\n"
    encoded = plain.encode(text, add_special_tokens=False)
    assert chat.encode(text) == (encoded.ids, encoded.offsets)
    assert chat.end_ids == {plain.token_to_id("<|im_end|>")}


def test_committed_tokenizer_is_what_its_maker_makes(smoke_model: Path) -> None:
    made = json.loads(build_tokenizer().to_str())
    assert made == json.loads((smoke_model / "tokenizer.json").read_text(encoding="utf-8"))


def _pieces(example: Example, chat: ChatTokens) -> list[tuple[str, bool]]:
    from recipes.chat import Tokens

    return marked(Tokens(list(example.ids), [bool(t) for t in example.trained]), chat.decode)
