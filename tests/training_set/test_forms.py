"""Every form that is read, from the files in examples/forms and from small variations of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.errors import InputError

FORMS = Path(__file__).parent.parent.parent / "examples" / "forms"
ASK, TELL = {"role": "user", "content": "Flat tyre?"}, {"role": "assistant", "content": "Find the hole."}

# file -> form, rows, usable, conversations, merged, kept per pair, examples
EXPECTED = {
    "full-export.json": ("training pairs, one JSON object", 13, 6, 3, 2, 0, 3),
    "pairs-v5.jsonl": ("training pairs, JSON Lines", 6, 6, 3, 2, 0, 3),
    "single-conversation.json": ("training pairs, one JSON object", 5, 2, 1, 1, 0, 1),
    "hand-written.json": ("training pairs, one JSON object", 3, 3, 2, 0, 1, 3),
    "turns.jsonl": ("turns, JSON Lines", 3, 3, 3, 0, 0, 3),
    "raw.json": ("turns, one JSON object", 1, 1, 1, 0, 0, 1),
    "messages.jsonl": ("OpenAI messages, JSON Lines", 3, 3, 3, 0, 0, 3),
    "tools.jsonl": ("OpenAI messages, JSON Lines", 2, 2, 2, 0, 0, 2),
    "alpaca.json": ("Alpaca, a JSON array", 2, 2, 2, 0, 0, 2),
    "sharegpt.jsonl": ("ShareGPT, JSON Lines", 2, 2, 2, 0, 0, 2),
    "prompt-completion.jsonl": ("prompt and completion, JSON Lines", 2, 2, 2, 0, 0, 2),
}


def test_every_shipped_form_is_in_the_table() -> None:
    assert {path.name for path in FORMS.iterdir()} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_shipped_form_is_recognised_and_counted(run, smoke, name: str) -> None:
    for tokenizer in (None, smoke):
        report, train, valid = run(FORMS / name, tokenizer=tokenizer)
        got = (report.form, report.rows, report.usable_rows, report.conversations, report.merged, report.per_pair)
        assert (*got, len(train) + len(valid)) == EXPECTED[name]
        assert report.tokens.exact is (tokenizer is not None)
        assert report.tokens.trained > 0


def test_full_export_and_its_jsonl_give_the_same_examples(run) -> None:
    full, lines = run(FORMS / "full-export.json"), run(FORMS / "pairs-v5.jsonl")
    assert [e["messages"] for e in full.examples] == [e["messages"] for e in lines.examples]
    assert [e["id"] for e in full.train] == [e["id"] for e in lines.train]


def test_a_document_names_the_line_that_each_pair_begins_on(run) -> None:
    lines = (FORMS / "full-export.json").read_text().splitlines()
    for example in run(FORMS / "full-export.json").examples:
        assert lines[example["line"] - 1].strip() == "{"
        assert f'"id": "{example["id"]}-2"' in lines[example["line"]]


def test_a_document_reads_the_same_in_one_line(run) -> None:
    document = json.loads((FORMS / "full-export.json").read_text())
    one_line = run(json.dumps(document).encode(), "full.json")
    assert [e["messages"] for e in one_line.examples] == [
        e["messages"] for e in run(FORMS / "full-export.json").examples
    ]


def test_raw_turns_are_put_in_the_order_of_their_numbers(run) -> None:
    (example,) = run(FORMS / "raw.json").examples
    assert [m["content"] for m in example["messages"]] == [
        "Gears slip.",
        "Adjust the rear cable.",
        "How far?",
        "A quarter turn at a time.",
    ]


def test_weight_zero_is_context_and_not_trained(run) -> None:
    example = next(e for e in run(FORMS / "messages.jsonl").examples if e["id"] == "line-3")
    assert [m.get("trained", False) for m in example["messages"]] == [False, False, False, True]


def test_tools_and_calls_are_carried_with_arguments_as_an_object(run) -> None:
    example = next(e for e in run(FORMS / "tools.jsonl").examples if e["id"] == "line-1")
    assert example["tools"][0]["function"]["name"] == "spare_part"
    called, answered, told = example["messages"][1:]
    assert called == {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "call-1",
                "type": "function",
                "function": {"name": "spare_part", "arguments": {"name": "brake pads"}},
            }
        ],
        "trained": True,
    }
    assert answered == {"role": "tool", "content": '{"stock": 4}', "tool_call_id": "call-1"}
    assert told["trained"]


def test_alpaca_joins_instruction_and_input(run) -> None:
    rows = [{"instruction": "Name the tool.", "input": "Pedal", "output": "A spanner.", "history": [["Hi", "Hello"]]}]
    (example,) = run(rows).examples
    assert [m["content"] for m in example["messages"]] == ["Hi", "Hello", "Name the tool.\n\nPedal", "A spanner."]


def test_only_the_completion_of_a_message_list_is_trained(run) -> None:
    rows = [{"prompt": [ASK, TELL, {"role": "user", "content": "And then?"}], "completion": [TELL]}]
    (example,) = run(rows).examples
    assert [m.get("trained", False) for m in example["messages"]] == [False, False, False, True]


def test_text_parts_are_joined(run) -> None:
    parts = [{"type": "text", "text": "Flat "}, {"type": "text", "text": "tyre?"}]
    (example,) = run([{"messages": [{"role": "user", "content": parts}, TELL]}]).examples
    assert example["messages"][0]["content"] == "Flat tyre?"


def test_a_json_array_of_any_form_is_read(run) -> None:
    rows = [{"messages": [ASK, TELL]}, {"messages": [{"role": "user", "content": "Rust?"}, TELL]}]
    prepared = run(json.dumps(rows, indent=1).encode(), "set.json")
    assert len(prepared.examples) == 2
    assert prepared.report.form == "OpenAI messages, a JSON array"


@pytest.mark.parametrize(
    "dressed",
    [
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: text.replace(b"\n", b"\r\n"),
        lambda text: b"\n\n" + text.replace(b"\n", b"\n  \n"),
        lambda text: text.rstrip(b"\n"),
        lambda text: b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"),
    ],
    ids=["byte order mark", "CRLF", "blank lines", "no last line break", "byte order mark and CRLF"],
)
def test_harmless_dress_changes_nothing(run, dressed) -> None:
    plain = (FORMS / "pairs-v5.jsonl").read_bytes()
    wanted, got = run(plain), run(dressed(plain))
    assert [e["messages"] for e in got.train] == [e["messages"] for e in wanted.train]
    assert got.report.tokens == wanted.report.tokens


def test_a_single_row_is_json_lines_whatever_its_form(run) -> None:
    assert run([{"turns": [ASK, TELL]}]).report.form == "turns, JSON Lines"


def test_a_set_of_headers_alone_is_refused(run) -> None:
    with pytest.raises(InputError, match="no examples; at least one"):
        run([{"_meta": {"total_pairs": 0}}])


def test_the_shipped_demo_set_merges_without_loss(run, smoke) -> None:
    report = run(FORMS.parent / "bicycle-care.jsonl", tokenizer=smoke, max_tokens=1024).report
    assert report.conversations >= 24
    assert report.merged > 0
    assert (report.per_pair, report.duplicates) == (0, 0)
    assert [skipped.reason for skipped in report.skipped] == ["no answer (a record of the user's turn)"]
    assert report.valid_examples > 1
