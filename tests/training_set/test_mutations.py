"""A corpus of damaged and odd training sets, made from seeds by a table: none is accepted wrongly, none ends in a
traceback, and every refusal names the file, the line where there is one, and what would be right.

Each row of the table says what must happen to its mutation: `refused`, with the words of the sentence, or `accepted`,
with what the report must then say.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from recipes.errors import InputError

FORMS = Path(__file__).parent.parent.parent / "examples" / "forms"
Rows = list[dict[str, Any]]


def _pairs() -> Rows:
    return [json.loads(line) for line in (FORMS / "pairs-v5.jsonl").read_text().splitlines()[1:]]


def _lines_of(name: str) -> Rows:
    return [json.loads(line) for line in (FORMS / name).read_text().splitlines()]


BASES: dict[str, Callable[[], Rows]] = {
    "pair": _pairs,
    "messages": lambda: _lines_of("messages.jsonl"),
    "turns": lambda: _lines_of("turns.jsonl"),
    "sharegpt": lambda: _lines_of("sharegpt.jsonl"),
    "alpaca": lambda: json.loads((FORMS / "alpaca.json").read_text()),
    "prompt": lambda: _lines_of("prompt-completion.jsonl")[:1] * 2,
}
TEXT_KEY = {
    "pair": "target_response",
    "messages": "messages",
    "turns": "turns",
    "sharegpt": "conversations",
    "alpaca": "output",
    "prompt": "completion",
}
ALL = tuple(BASES)
SYSTEM = b"You explain bicycle care. Answer in short, plain sentences."
CHATS = ("messages", "turns")


Make = Callable[[list[bytes], random.Random, int], bytes]
"(lines of a set, random generator, index of the line to hit) -> a file"


class Mutation(NamedTuple):
    """One row of the table."""

    name: str
    forms: tuple[str, ...]
    make: Make
    refused: str = ""
    "Words of the sentence; empty where the set must be accepted."
    accepted: Callable[[Any, Any], bool] = lambda got, plain: True
    "(prepared, prepared without the mutation) -> the report says what it must."
    on_line: bool = True
    "The refusal names the line that was hit."
    first: bool = True
    "May hit the first line, by which the form is recognised."


def _joined(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def _on_line(change: Callable[[bytes, random.Random], bytes]) -> Make:
    """A mutation of the text of one line."""
    return lambda lines, rng, at: _joined([*lines[:at], change(lines[at], rng), *lines[at + 1 :]])


def _on_row(change: Callable[[dict[str, Any]], Any]) -> Make:
    """A mutation of the value of one line."""

    def changed(line: bytes, rng: random.Random) -> bytes:
        row = json.loads(line)
        result = change(row)
        return json.dumps(row if result is None else result).encode()

    return _on_line(changed)


def _with_key(text: bytes) -> Make:
    """Adds `text`, a key and a value, to the end of one object."""
    return _on_line(lambda line, rng: line.rstrip()[:-1] + b", " + text + b"}")


def _insert(text: bytes) -> Make:
    return lambda lines, rng, at: _joined([*lines[:at], text, *lines[at:]])


def _whole(change: Callable[[bytes], bytes]) -> Make:
    return lambda lines, rng, at: change(_joined(lines))


def _cut(line: bytes, rng: random.Random) -> bytes:
    return line[: rng.randrange(2, len(line) - 1)]


def _first_string_byte(new: bytes) -> Callable[[bytes, random.Random], bytes]:
    """Puts `new` after the opening quote of a random text value."""

    def change(line: bytes, rng: random.Random) -> bytes:
        places = [i + 4 for i in range(len(line)) if line[i : i + 4] == b'": "']
        at = rng.choice(places)
        return line[:at] + new + line[at:]

    return change


def _set(**values: Any) -> Make:
    """Sets keys of the row."""
    return _on_row(lambda row: row.update(values))


def _drop(key: str) -> Make:
    """Removes a key of the row."""
    return _on_row(lambda row: {k: v for k, v in row.items() if k != key})


def _text_key(value: Any) -> Make:
    """Gives the key that holds the text another value."""
    return _on_row(lambda row: row.update({k: value for k in TEXT_KEY.values() if k in row}))


def _turns(row: dict[str, Any]) -> list[dict[str, Any]]:
    return next(row[k] for k in ("messages", "turns", "conversations", "conversation_history") if k in row)


def _first(**values: Any) -> Make:
    """Sets keys of the first message."""
    return _on_row(lambda row: _turns(row)[0].update(values))


def _last(**values: Any) -> Make:
    """Sets keys of the last message."""
    return _on_row(lambda row: _turns(row)[-1].update(values))


def _swap(old: bytes, new: bytes) -> Make:
    """Replaces the first place of some bytes in the line."""
    return _on_line(lambda line, rng: line.replace(old, new, 1))


def _text_key_twice(line: bytes, rng: random.Random) -> bytes:
    texts = {k: v for k, v in json.loads(line).items() if k in TEXT_KEY.values()}
    return line[:-1] + b", " + json.dumps(texts).encode()[1:]


def _swap_roles(row: dict[str, Any]) -> None:
    swapped = {"user": "assistant", "assistant": "user", "human": "gpt", "gpt": "human", "system": "system"}
    for turn in row.get("conversation_history") or row.get("messages") or row.get("turns") or row["conversations"]:
        key = "from" if "from" in turn else "role"
        turn[key] = swapped[turn[key]]
    if "conversation_history" not in row:
        turns = row.get("messages") or row.get("turns") or row["conversations"]
        del turns[[t.get("role", t.get("from")) in ("user", "human") for t in turns].index(True) + 1 :]


def _same(got: Any, plain: Any) -> bool:
    """The same examples on the same sides, whatever they are called and wherever they stand."""
    return all(
        sorted(repr(e["messages"]) for e in one) == sorted(repr(e["messages"]) for e in other)
        for one, other in ((got.train, plain.train), (got.valid, plain.valid))
    )


def _one_skipped(got: Any, plain: Any) -> bool:
    return [skipped.count for skipped in got.report.skipped] == [1]


def _one_duplicate(got: Any, plain: Any) -> bool:
    return got.report.duplicates == plain.report.duplicates + 1 and len(got.examples) == len(plain.examples)


def _no_system(got: Any, plain: Any) -> bool:
    return all(example["messages"][0]["role"] == "user" for example in got.examples)


def _cut_at_the_end(lines: list[bytes], rng: random.Random, at: int) -> bytes:
    return _joined(lines[:-1]) + _cut(lines[-1], rng)


def _without_a_comma(line: bytes, rng: random.Random) -> bytes:
    return line.replace(b'", "', b'" "', 1).replace(b"}, {", b"} {", 1)


def _pretty_array(lines: list[bytes], rng: random.Random, at: int) -> bytes:
    return json.dumps([json.loads(line) for line in lines], indent=2).encode()


def _other_form(lines: list[bytes], rng: random.Random, at: int) -> bytes:
    keys = json.loads(lines[0]).keys()
    other = rng.choice([base()[0] for name, base in BASES.items() if TEXT_KEY[name] not in keys])
    return _insert(json.dumps(other).encode())(lines, rng, at)


NOT_JSON = r"not valid JSON"

TABLE = [
    # broken JSON, with line and column
    Mutation("cut line", ALL, _on_line(_cut), NOT_JSON),
    Mutation("cut last line", ALL, _cut_at_the_end, NOT_JSON, on_line=False),
    Mutation("stray backslash after a number", ALL, _with_key(b'"score": 3\\'), NOT_JSON),
    Mutation("bare word", ALL, _with_key(b'"note": oops'), NOT_JSON),
    Mutation("single quotes", ALL, _on_line(lambda line, rng: line.replace(b'"', b"'")), NOT_JSON),
    Mutation("comma before the closing brace", ALL, _on_line(lambda line, rng: line[:-1] + b",}"), NOT_JSON),
    Mutation("missing comma", ALL, _on_line(_without_a_comma), NOT_JSON),
    Mutation(
        "comma after every object", ALL, _whole(lambda text: text.replace(b"}\n", b"},\n")), NOT_JSON, on_line=False
    ),
    Mutation("two objects on a line", ALL, _on_line(lambda line, rng: line + b" " + line), NOT_JSON),
    Mutation("object over two lines", ALL, _swap(b", ", b",\n"), NOT_JSON, first=False),
    Mutation("NaN", ALL, _with_key(b'"quality_score": NaN'), NOT_JSON),
    Mutation("Infinity", ALL, _with_key(b'"quality_score": [1, -Infinity]'), NOT_JSON),
    Mutation("null byte in text", ALL, _on_line(_first_string_byte(b"\0")), NOT_JSON),
    Mutation("tab in text", ALL, _on_line(_first_string_byte(b"a\tb")), NOT_JSON),
    Mutation("unknown escape", ALL, _on_line(_first_string_byte(b"\\q")), NOT_JSON),
    Mutation("half a surrogate pair", ALL, _on_line(_first_string_byte(b"\\ud83d ")), NOT_JSON),
    Mutation("comment line", ALL, _insert(b"// reviewed by hand"), NOT_JSON),
    Mutation("a word before the object", ALL, _on_line(lambda line, rng: b"pair " + line), NOT_JSON),
    # broken text
    Mutation("Latin-1 in text", ALL, _on_line(_first_string_byte("\u00fc".encode("latin-1"))), "not UTF-8"),
    Mutation("Latin-1 in a skipped key", ALL, _with_key(b'"note": "\xfc"'), "not UTF-8"),
    Mutation("overlong encoding", ALL, _on_line(_first_string_byte(b"\xc0\xaf")), "not UTF-8"),
    # sizes
    Mutation("nested 100000 deep", ALL, _with_key(b'"x": ' + b"[" * 100_000 + b"]" * 100_000), "nested"),
    Mutation("nested 40 deep", ALL, _with_key(b'"x": ' + b'{"y":[' * 20 + b"]}" * 20), "nested"),
    Mutation("brackets in text are no nesting", ALL, _with_key(b'"x": "' + b"[{" * 300 + b'"'), accepted=_same),
    Mutation("line over 16 MiB", ("pair",), _with_key(b'"x": "' + b"a" * (16 * 2**20) + b'"'), "longer than 16 MiB"),
    # keys and types
    Mutation(
        "text key is missing",
        ALL,
        _on_row(lambda row: {k: v for k, v in row.items() if k not in TEXT_KEY.values()}),
        "no key|no known form",
    ),
    Mutation("text key is a number", ALL, _text_key(5), "a whole number"),
    Mutation("text key is true", ALL, _text_key(True), "true or false"),
    Mutation("text key is an object", ALL, _text_key({}), "an object"),
    Mutation("text key twice", ALL, _on_line(_text_key_twice), "twice"),
    Mutation("content twice", CHATS, _swap(b'"content": ', b'"content": "x", "content": '), "'content' twice"),
    Mutation("keys in another case", ALL, _on_row(lambda row: {k.title(): v for k, v in row.items()}), "no known form"),
    Mutation("empty object", ALL, _insert(b"{}"), "no known form"),
    Mutation("an error reply", ALL, _insert(b'{"statusCode": "400", "error": "InvalidJWT"}'), "no known form"),
    *(
        Mutation(f"row is {text.decode()}", ALL, _insert(text), "not an object")
        for text in (b"[1]", b'"text"', b"7", b"null")
    ),
    Mutation("history is text", ("pair",), _set(conversation_history="none"), "text"),
    Mutation("history role is a number", ("pair",), _first(role=1), r"conversation_history\[0\].role"),
    Mutation("history content is null", ("pair",), _first(content=None), r"conversation_history\[0\].content"),
    Mutation("turn number is text", ("pair",), _set(turn_number="two"), "turn_number: text"),
    Mutation("no conversation_id", ("pair",), _drop("conversation_id"), "no key 'conversation_id'"),
    Mutation("conversation_id is a list", ("pair",), _set(conversation_id=[1]), "conversation_id: a list"),
    Mutation("instruction is null", ("alpaca",), _set(instruction=None), "instruction: null"),
    Mutation("history of three", ("alpaca",), _set(history=[["a", "b", "c"]]), "history"),
    # roles and messages
    Mutation("unknown role", (*CHATS, "pair"), _first(role="customer"), "the role 'customer'"),
    Mutation("role in another case", (*CHATS, "pair"), _first(role="User"), "the role 'User'"),
    Mutation("unknown speaker", ("sharegpt",), _last(**{"from": "observation"}), "'observation'"),
    Mutation(
        "swapped roles",
        ("pair", *CHATS, "sharegpt"),
        _on_row(_swap_roles),
        "before any question|as the assistant's message",
    ),
    Mutation("no role", CHATS, _swap(b'"role"', b'"rolle"'), "no key 'role'"),
    Mutation("null content", CHATS, _first(content=None), "content: null"),
    Mutation("no messages", CHATS, _text_key([]), "no assistant message"),
    Mutation("only questions", CHATS, _text_key([{"role": "user", "content": "?"}]), "no assistant message"),
    Mutation("a message is text", CHATS, _text_key(["hello"]), r"\[0\]: text"),
    Mutation("weight 2", CHATS, _last(role="assistant", weight=2), "weight: 2"),
    Mutation("weight is text", CHATS, _last(weight="1"), "weight: text"),
    Mutation(
        "all weights 0",
        ("messages",),
        _on_row(lambda row: {"messages": [m | {"weight": 0} for m in row["messages"]]}),
        "weight 0",
    ),
    Mutation("an image", ("messages",), _first(content=[{"type": "image_url"}]), "'image_url'"),
    Mutation(
        "broken tool arguments",
        ("messages",),
        _last(tool_calls=[{"function": {"name": "f", "arguments": "{name"}}]),
        r"tool_calls\[0\].function.arguments",
    ),
    Mutation("outdated function_call", ("messages",), _last(function_call={"name": "f"}), "function_call"),
    Mutation("outdated functions", ("messages",), _with_key(b'"functions": [{}]'), "functions"),
    Mutation("tools are text", ("messages",), _with_key(b'"tools": "calculator"'), "tools: text"),
    Mutation("tools in ShareGPT", ("sharegpt",), _with_key(b'"tools": "[{}]"'), "tools in the ShareGPT form"),
    Mutation("empty tools in ShareGPT", ("sharegpt",), _with_key(b'"tools": "[]"'), accepted=_same),
    Mutation(
        "an answer with a worse one beside it",
        ("messages", "sharegpt", "alpaca", "prompt"),
        _with_key(b'"rejected": "b"'),
        "preference data",
    ),
    Mutation("a label beside the completion", ("prompt",), _with_key(b'"label": false'), "preference data"),
    # forms
    Mutation("mixed forms", ALL, _other_form, "in a file of", first=False),
    Mutation("a DPO row", ALL, _insert(b'{"prompt": "a", "chosen": "b", "rejected": "c"}'), "preference data"),
    Mutation("a KTO row", ALL, _insert(b'{"prompt": "a", "completion": "b", "label": true}'), "preference data"),
    # what must be taken as it is
    Mutation("CRLF", ALL, _whole(lambda text: text.replace(b"\n", b"\r\n")), accepted=_same),
    Mutation("byte order mark", ALL, _whole(lambda text: b"\xef\xbb\xbf" + text), accepted=_same),
    Mutation("blank lines", ALL, _whole(lambda text: text.replace(b"\n", b"\n\n \n")), accepted=_same),
    Mutation("no last line break", ALL, _whole(bytes.rstrip), accepted=_same),
    Mutation("unknown keys", ALL, _with_key(b'"reviewer": {"name": "x", "tags": [1, null]}'), accepted=_same),
    Mutation("keys in another order", ALL, _on_row(lambda row: dict(reversed(row.items()))), accepted=_same),
    Mutation("header anywhere", ALL, _insert(b'{"_meta": {"file_name": "x"}}'), accepted=_same),
    Mutation("odd header", ALL, _insert(b'{"_meta": ["any", {"total_pairs": "many"}]}'), accepted=_same),
    Mutation("a JSON array", ALL, lambda lines, rng, at: b"[" + b",".join(lines) + b"]", accepted=_same),
    Mutation("a pretty JSON array", ALL, _pretty_array, accepted=_same),
    Mutation(
        "numbers as conversation ids",
        ("pair", "turns"),
        _set(conversation_id=9),
        accepted=lambda got, plain: got.report.rows == plain.report.rows,
    ),
    Mutation("null target", ("pair",), _set(target_response=None), accepted=_one_skipped),
    Mutation("empty output", ("alpaca", "prompt"), _text_key(""), accepted=_one_skipped),
    Mutation("a repeated row", ALL, lambda lines, rng, at: _joined([*lines, lines[at]]), accepted=_one_duplicate),
    Mutation(
        "a question at the end",
        CHATS,
        _on_row(lambda row: _turns(row).append({"role": "user", "content": "And?"})),
        accepted=_same,
    ),
    Mutation("empty system prompt", ("pair",), _whole(lambda text: text.replace(SYSTEM, b"")), accepted=_no_system),
]

CASES = [
    pytest.param(mutation, form, seed, id=f"{mutation.name}-{form}-{seed}")
    for mutation in TABLE
    for form in mutation.forms
    for seed in (1, 2)
]


def test_the_corpus_is_as_large_as_promised() -> None:
    assert len(CASES) >= 300
    assert len({case.id for case in CASES}) == len(CASES)


@pytest.mark.parametrize(("mutation", "form", "seed"), CASES)
def test_mutation_meets_its_fate(run, mutation: Mutation, form: str, seed: int) -> None:
    rng = random.Random(f"{mutation.name} {form} {seed}")
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in BASES[form]()]
    at = rng.randrange(0 if mutation.first else 1, len(lines))
    content = mutation.make(lines, rng, at)
    if not mutation.refused:
        assert mutation.accepted(run(content), run(_joined(lines)))
        return
    with pytest.raises(InputError, match=mutation.refused) as caught:
        run(content)
    assert caught.value.exit_code == 2
    for problem in caught.value.problems:
        assert problem.where.startswith("set.jsonl")
        assert problem.got
        assert problem.want
        assert "Traceback" not in str(problem)
    if mutation.on_line:
        (problem,) = [p for p in caught.value.problems if p.where.startswith(f"set.jsonl:{at + 1}")]
        if mutation.refused == NOT_JSON:
            assert problem.where.count(":") >= 2, "line and column"
