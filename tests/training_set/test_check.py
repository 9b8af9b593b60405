"""`lorry check`: the whole text a person reads, the preview, and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.errors import InputError
from recipes.preparation import TrainingSetReport
from recipes.recipe import Data
from scripts.check import check, printable
from scripts.cli import main

WORDS = [["check"], *([verb, "smoke/zero3", "--training-set"] for verb in ("plan", "launch", "run"))]
WORDS += [["render", "smoke/zero3", "--backend", "local", "--training-set"]]
FORMS = Path(__file__).parent.parent.parent / "examples" / "forms"


def test_the_text_says_what_was_used_skipped_and_why(run, smoke) -> None:
    tokens = run(FORMS / "full-export.json", tokenizer=smoke).report.tokens
    assert check(FORMS / "full-export.json", Data(), 1, smoke) == (
        "full-export.json: training pairs, one JSON object (14.5 KB)\n"
        "\n"
        "  rows          13 read, 6 used\n"
        "  left out      7: no answer (a record of the user's turn) (lines 18, 66, 146, 265, 313 and 2 more)\n"
        "  conversations 3, 2 of them merged without loss\n"
        "  duplicates    none\n"
        f"  learned from  2 examples, {tokens.train} tokens ({tokens.trained} trained)\n"
        f"  held out      1 example, {tokens.valid} tokens, to measure with\n"
        f"  longest       {tokens.longest} tokens (chain); nothing is cut short\n"
        "  counted by    the tokenizer of lorry/smoke\n"
        "\n"
        "Worth knowing\n"
        "  - A very small set: 2 examples to learn from. Expect little.\n"
        "  - Only one conversation is held out: its loss says little about new questions.\n"
        "  - Where the history ended with the current question again, it is used once "
        "(lines 42, 106, 202, 289, 353 and 1 more).\n"
        "  - Every example has the same system prompt: use it word for word when you call the adapter.\n"
    )


def test_estimates_are_called_estimates() -> None:
    text = check(FORMS / "turns.jsonl", Data(), 1, None)
    assert "about 43 tokens" in text
    assert "counted by    estimate: 1.35 tokens per word" in text


def test_the_preview_marks_exactly_what_is_trained(smoke) -> None:
    text = check(FORMS / "tools.jsonl", Data(validation_fraction=0.0), 1, smoke, preview=True)
    shown = text.partition("[[double brackets]]\n\n")[2]
    assert (
        '[[<tool_call>\n{"name": "spare_part", "arguments": {"name": "brake pads"}}\n</tool_call><|im_end|>]]' in shown
    )
    assert "[[Yes, four pairs.<|im_end|>]]" in shown
    assert shown.count("[[") == 2


def test_the_preview_in_colour_needs_no_brackets(smoke) -> None:
    text = check(FORMS / "turns.jsonl", Data(), 1, smoke, preview=True, colour=True)
    assert "\x1b[32mFirm; check the maker's figure.<|im_end|>\x1b[0m" in text
    assert "[[" not in text


def test_without_a_tokenizer_the_preview_is_an_outline() -> None:
    text = check(FORMS / "turns.jsonl", Data(), 1, None, preview=True)
    assert "user: How tight is a wheel nut?\nassistant: [[Firm; check the maker's figure.]]" in text
    assert "without the model's tokenizer" in text


def test_json_is_the_report_and_the_preview(smoke) -> None:
    value = json.loads(check(FORMS / "turns.jsonl", Data(), 1, smoke, preview=True, as_json=True))
    pieces = value.pop("preview")
    assert TrainingSetReport.model_validate(value).train_examples == 2
    assert [piece["text"] for piece in pieces if piece["trained"]] == ["Firm; check the maker's figure.<|im_end|>"]
    assert "preview" not in json.loads(check(FORMS / "turns.jsonl", Data(), 1, smoke, as_json=True))


def test_the_canonical_files_are_kept_where_asked(tmp_path: Path) -> None:
    check(FORMS / "turns.jsonl", Data(), 1, None, out=tmp_path / "data")
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["report.json", "train.jsonl", "valid.jsonl"]


def test_a_training_set_cannot_drive_the_terminal(tmp_path: Path) -> None:
    row = {
        "conversation_id": "\x1b[2Jgone",
        "turns": [{"role": "user", "content": "\x1b]0;title\x07?"}, {"role": "assistant", "content": "ok\u202e\r"}],
    }
    source = tmp_path / "set.jsonl"
    source.write_text(json.dumps(row))
    text = check(source, Data(), 1, None, preview=True)
    assert "\\u001b[2Jgone" in text
    assert all(c.isprintable() or c == "\n" for c in text)
    assert printable("gr\u00f6\u00dfer\n") == "gr\u00f6\u00dfer\n"


def test_a_refused_set_raises_with_its_problems(tmp_path: Path) -> None:
    source = tmp_path / "set.csv"
    source.write_text("question,answer\nRust?,Oil it.\n")
    with pytest.raises(InputError) as caught:
        check(source, Data(), 1, None)
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        "set.csv: a table (CSV); export the training set as JSON Lines: one JSON object per line, saved as UTF-8"
    )


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize(
    ("url", "steps"),
    [
        (
            "s3://other-account/set.jsonl",
            ("`aws s3 cp s3://other-account/set.jsonl set.jsonl`", "grant you s3:GetObject"),
        ),
        ("https://example.org/set.jsonl", ("`curl --output set.jsonl https://example.org/set.jsonl`",)),
    ],
)
def test_a_url_in_place_of_a_file_is_answered_with_the_command_that_fetches_it(
    words: list[str], url: str, steps: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, url]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"training set {url}: a URL, and a file of this machine is read; ")
    assert all(step in said for step in steps)
    assert len(said.splitlines()) == 1
