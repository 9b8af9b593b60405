"""The ten conversion rules, each by example."""

from __future__ import annotations

import pytest

from recipes.chat import marked, tokenise
from recipes.errors import InputError

THREE = ("My chain squeaks.", "Wipe it, then oil it.", "Which oil?", "A light one.", "In winter?", "A thicker one.")


def roles(example) -> list[str]:
    return [m["role"] for m in example["messages"]]


# 1. `_meta` is dropped by key, wherever it stands
@pytest.mark.parametrize("place", [0, 1, 3])
def test_meta_is_dropped_wherever_it_stands(run, make_pairs, place: int) -> None:
    rows = make_pairs("c1", *THREE)
    with_meta = [*rows[:place], {"_meta": {"file_name": "x", "total_pairs": 3, "odd": [1]}}, *rows[place:]]
    got, plain = run(with_meta), run(rows)
    assert [e["messages"] for e in got.examples] == [e["messages"] for e in plain.examples]
    assert (got.report.rows, got.report.usable_rows, got.report.skipped) == (3, 3, ())


def test_meta_inside_a_pair_or_a_messages_file_is_dropped(run, make_pairs) -> None:
    pair = make_pairs("c1", *THREE[:2])[0] | {"_meta": {"total_pairs": 1}}
    assert len(run([pair]).examples) == 1
    chat = {"messages": [{"role": "user", "content": "Rust?"}, {"role": "assistant", "content": "Oil it."}]}
    assert len(run([{"_meta": {}}, chat]).examples) == 1


def test_a_header_that_announces_another_number_is_worth_a_note(run, make_pairs) -> None:
    rows = [{"_meta": {"total_pairs": 9}}, *make_pairs("c1", *THREE)]
    assert "The header announces 9 pairs, the file holds 3: was it cut?" in run(rows).report.notes


# 2. the history's last message is dropped where it is the current question
def test_the_current_question_stands_once(run, make_pairs) -> None:
    (example,) = run(make_pairs("c1", *THREE)).examples
    assert roles(example) == ["system"] + ["user", "assistant"] * 3


def test_a_question_that_differs_in_white_space_only_stands_once(run, make_pairs) -> None:
    row = make_pairs("c1", "Which oil?", "A light one.")[0]
    row["conversation_history"][-1]["content"] = "Which oil? \n"
    assert roles(run([row]).examples[0]) == ["system", "user", "assistant"]


def test_a_history_without_the_current_question_keeps_it(run, make_pairs) -> None:
    row = make_pairs("c1", *THREE[:4])[1]
    row["conversation_history"].pop()
    (example,) = run([row]).examples
    assert [m["content"] for m in example["messages"][1:]] == list(THREE[:4])


def test_an_equal_message_earlier_in_the_history_is_kept(run, make_pairs) -> None:
    (example,) = run(make_pairs("c1", "Hello", "Hello!", "Hello", "Hello again!")).examples
    assert [m["content"] for m in example["messages"][1:]] == ["Hello", "Hello!", "Hello", "Hello again!"]


# 3. a null or empty target is a record of the user's turn
@pytest.mark.parametrize("target", [None, "", " \n"])
def test_a_pair_without_a_target_is_skipped_and_counted(run, make_pairs, target) -> None:
    rows = make_pairs("c1", *THREE)
    rows.insert(1, rows[1] | {"turn_number": 3, "target_response": target})
    prepared = run(rows)
    (skipped,) = prepared.report.skipped
    assert (skipped.reason, skipped.count, skipped.lines) == ("no answer (a record of the user's turn)", 1, (2,))
    assert (prepared.report.rows, prepared.report.usable_rows) == (4, 3)


# 4. one example per conversation where that loses nothing, else one per pair
def test_pairs_whose_histories_hold_the_earlier_targets_are_merged(run, make_pairs) -> None:
    prepared = run(make_pairs("c1", *THREE))
    assert (prepared.report.merged, prepared.report.per_pair) == (1, 0)
    (example,) = prepared.examples
    assert [m["content"] for m in example["messages"] if m.get("trained")] == list(THREE[1::2])


def test_pairs_are_put_in_the_order_of_their_turns(run, make_pairs) -> None:
    assert run(make_pairs("c1", *THREE)[::-1]).answers == list(THREE[1::2])


@pytest.mark.parametrize("changed", ["history", "system"])
def test_pairs_that_merging_would_change_stay_apart(run, make_pairs, changed: str) -> None:
    rows = make_pairs("c1", *THREE)
    if changed == "history":
        rows[2]["conversation_history"][1]["content"] = "...oil it..."
    else:
        rows[2]["system_prompt"] = "You sell bicycles."
    prepared = run(rows)
    assert (prepared.report.merged, prepared.report.per_pair) == (0, 1)
    assert [e["id"] for e in prepared.examples] == ["c1", "c1/2", "c1/3"]
    assert [sum(m.get("trained", False) for m in e["messages"]) for e in prepared.examples] == [1, 1, 1]
    assert prepared.answers == list(THREE[1::2])
    assert all(e["messages"][-1].get("trained") for e in prepared.examples)


def test_an_answer_that_is_no_target_is_context_in_the_merged_example(run, make_pairs) -> None:
    rows = make_pairs("c1", *THREE)
    del rows[1]
    prepared = run(rows)
    assert prepared.report.merged == 1
    assert prepared.answers == [THREE[1], THREE[5]]


# 5. a history without roles is never guessed
@pytest.mark.parametrize("turn", [{"turn": 1, "content": "...soft..."}, {"turn": 1, "assistant": "...soft..."}])
def test_a_history_without_roles_leaves_the_pair_alone(run, make_pairs, turn) -> None:
    row = make_pairs("c1", *THREE[:4])[1]
    row["conversation_history"].insert(0, turn)
    prepared = run([row])
    (example,) = prepared.examples
    assert [m["content"] for m in example["messages"]] == ["You explain bicycle care.", "Which oil?", "A light one."]
    assert any("does not say who spoke" in note and "line 1" in note for note in prepared.report.notes)


# 6. only role and content reach the template
def test_emotions_strategies_and_turn_keys_are_stripped(run, make_pairs) -> None:
    row = make_pairs("c1", *THREE[:4])[1] | {"emotional_context": {"a": 1}, "response_strategy": {"b": 2}}
    row["conversation_history"][0] |= {"strategy_applied": "calm", "emotional_state": {"primary": "sad"}}
    (example,) = run([row]).examples
    assert set(example) == {"id", "line", "messages"}
    assert {key for m in example["messages"] for key in m} == {"role", "content", "trained"}


# 7. a conversation may end on a user's turn: it is cut
def test_a_conversation_that_ends_on_a_user_turn_is_cut(run) -> None:
    turns = [
        {"role": "user", "content": "Flat tyre?"},
        {"role": "assistant", "content": "Find the hole."},
        {"role": "user", "content": "Thanks"},
        {"role": "user", "content": "Bye"},
    ]
    prepared = run([{"turns": turns}])
    assert roles(prepared.examples[0]) == ["user", "assistant"]
    assert any("What follows the last answer" in note for note in prepared.report.notes)


def test_no_example_ever_ends_without_a_trained_answer(run, make_pairs) -> None:
    rows = make_pairs("c1", *THREE, "Thanks!")
    assert all(e["messages"][-1].get("trained") for e in run(rows).examples)


# 8. duplicates are dropped, and the split is by conversation
def test_the_same_conversation_in_two_exports_is_used_once(run, make_pairs) -> None:
    prepared = run([*make_pairs("c1", *THREE), *make_pairs("c1-again", *THREE), *make_pairs("c2", "Rust?", "Oil it.")])
    assert prepared.report.duplicates == 1
    assert sorted(e["id"] for e in prepared.examples) == ["c1", "c2"]


def test_a_repeated_row_does_not_stop_the_merge(run, make_pairs) -> None:
    rows = make_pairs("c1", *THREE)
    prepared = run([*rows, rows[1], rows[1]])
    assert (prepared.report.merged, prepared.report.duplicates) == (1, 2)


def test_white_space_and_composed_letters_do_not_hide_a_duplicate(run) -> None:
    def row(question: str):
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "Ja."}]}

    assert run([row("Gr\u00f6\u00dfe  42?"), row("Gro\u0308\u00dfe 42? ")]).report.duplicates == 1


def test_a_conversation_and_its_beginning_fall_on_one_side(run, make_pairs) -> None:
    """The second of two exports goes on where the first stopped: apart, one would be validated on what it learned."""
    for seed in range(12):
        rows = [*make_pairs("short", *THREE[:2]), *make_pairs("long", *THREE)]
        rows += [row for n in range(4) for row in make_pairs(f"other-{n}", f"Question {n}?", "Answer.")]
        prepared = run(rows, seed=seed, validation_fraction=0.5)
        sides = [{e["id"] for e in side} & {"short", "long"} for side in (prepared.train, prepared.valid)]
        assert sorted(map(len, sides)) == [0, 2]


def test_at_least_one_conversation_is_held_out(run, make_pairs) -> None:
    rows = [row for n in range(3) for row in make_pairs(f"c{n}", f"Question {n}?", "Answer.")]
    prepared = run(rows, validation_fraction=0.01)
    assert (len(prepared.train), len(prepared.valid)) == (2, 1)


def test_nothing_is_held_out_of_one_conversation_or_when_none_is_wanted(run, make_pairs) -> None:
    one = run(make_pairs("c1", *THREE))
    assert (len(one.train), len(one.valid)) == (1, 0)
    assert any("Nothing is held out" in note for note in one.report.notes)
    rows = [*make_pairs("c1", *THREE), *make_pairs("c2", "Rust?", "Oil it.")]
    assert run(rows, validation_fraction=0.0).valid == []


# 9. no usable example refuses the set (the forms are in test_forms.py, lines in messages in test_refusals.py)
def test_no_usable_example_is_refused_with_the_reasons(run, make_pairs) -> None:
    rows = [row | {"target_response": None} for row in make_pairs("c1", *THREE)]
    with pytest.raises(InputError) as caught:
        run(rows)
    wanted = "set.jsonl: no usable example (3 left out: no answer (a record of the user's turn)); at least one with an "
    assert str(caught.value) == wanted + "answer"
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"messages": [{"role": "user", "content": "Rust?"}]}, "no assistant message"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
            "every assistant message has weight 0",
        ),
    ],
)
def test_a_row_with_nothing_to_train_refuses_the_set(run, row, sentence: str) -> None:
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(InputError, match=f"set.jsonl:2: {sentence}"):
        run([good, row])


# 10. the report: tokens, longest example, nothing truncated
def test_tokens_are_those_of_the_model_and_only_answers_are_trained(run, smoke, make_pairs) -> None:
    prepared = run(make_pairs("c1", *THREE), tokenizer=smoke)
    (example,) = prepared.examples
    tokens = tokenise(example["messages"], lambda m, g: smoke.render(m, g), smoke.encode, smoke.end_ids)
    assert prepared.report.tokens.train == len(tokens.ids)
    assert prepared.report.tokens.trained == sum(tokens.trained)
    trained = [text for text, is_trained in marked(tokens, smoke.decode) if is_trained]
    assert trained == [f"{answer}<|im_end|>" for answer in THREE[1::2]]


def test_an_estimate_says_so_and_follows_the_words(run, make_pairs) -> None:
    prepared = run(make_pairs("c1", "one two three four", "five six", system=None))
    tokens = prepared.report.tokens
    assert not tokens.exact
    assert "estimate" in tokens.tokenizer
    assert tokens.train == round(6 * 1.35 + 2 * 4)
    assert any("estimated" in note for note in prepared.report.notes)


def test_the_longest_example_is_named(run, smoke, make_pairs) -> None:
    rows = [*make_pairs("short", "Rust?", "Oil."), *make_pairs("long", "Rust?", "Oil it every week, and wipe it.")]
    assert run(rows, tokenizer=smoke).report.tokens.longest_id == "long"


@pytest.mark.parametrize("exact", [True, False])
def test_an_example_over_the_limit_refuses_the_set_by_name_line_and_length(run, smoke, make_pairs, exact) -> None:
    rows = [*make_pairs("short", "Rust?", "Oil."), *make_pairs("long", "Rust?", "word " * 200)]
    with pytest.raises(InputError) as caught:
        run(rows, tokenizer=smoke if exact else None, max_tokens=200)
    (problem,) = caught.value.problems
    assert problem.where == "set.jsonl:2"
    assert problem.got.startswith("'long' has " if exact else "'long' has about ")
    assert "at most 200" in problem.want


def test_an_example_over_the_limit_is_left_out_and_counted_when_asked(run, smoke, make_pairs) -> None:
    rows = [*make_pairs("short", "Rust?", "Oil."), *make_pairs("long", "Rust?", "word " * 200)]
    prepared = run(rows, tokenizer=smoke, max_tokens=200, too_long="skip")
    assert [e["id"] for e in prepared.examples] == ["short"]
    (skipped,) = prepared.report.skipped
    assert (skipped.reason, skipped.count, skipped.lines) == ("longer than 200 tokens", 1, (2,))


def test_no_text_is_ever_shortened(run, smoke, make_pairs) -> None:
    long = "word " * 5000
    prepared = run(make_pairs("c1", "Rust?", long), tokenizer=smoke, max_tokens=200_000)
    assert prepared.answers == [long]


def test_the_same_file_and_seed_give_the_same_bytes(tmp_path, make_pairs) -> None:
    import json

    from recipes.recipe import Data
    from scripts.training_set import prepare

    source = tmp_path / "set.jsonl"
    rows = [row for n in range(9) for row in make_pairs(f"c{n}", f"Question {n}?", "Answer.")]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for out in ("one", "two"):
        prepare(source, tmp_path / out, Data(), 3)
    for name in ("train.jsonl", "valid.jsonl", "report.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


# more than the ten
def test_empty_answers_inside_a_conversation_are_context_and_counted(run) -> None:
    messages = [
        {"role": "user", "content": "Rust?"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "Rust?"},
        {"role": "assistant", "content": "Oil it."},
    ]
    prepared = run([{"messages": messages}])
    assert prepared.answers == ["Oil it."]
    assert any("Empty answers" in note for note in prepared.report.notes)


def test_a_row_of_empty_answers_is_left_out_and_counted(run) -> None:
    empty = {"messages": [{"role": "user", "content": "Rust?"}, {"role": "assistant", "content": " "}]}
    good = {"messages": [{"role": "user", "content": "Rust?"}, {"role": "assistant", "content": "Oil it."}]}
    (skipped,) = run([empty, good]).report.skipped
    assert (skipped.reason, skipped.lines) == ("every answer is empty", (1,))


def test_an_answer_before_any_question_is_not_trained(run) -> None:
    messages = [
        {"role": "assistant", "content": "Welcome!"},
        {"role": "user", "content": "Rust?"},
        {"role": "assistant", "content": "Oil it."},
    ]
    assert run([{"messages": messages}]).answers == ["Oil it."]


def test_the_system_prompt_is_kept_and_an_empty_one_is_not(run, make_pairs) -> None:
    assert roles(run(make_pairs("c1", "Rust?", "Oil.")).examples[0])[0] == "system"
    assert roles(run(make_pairs("c1", "Rust?", "Oil.", system=" ")).examples[0]) == ["user", "assistant"]


def test_control_tokens_of_the_model_in_the_text_are_worth_a_note(run, smoke, make_pairs) -> None:
    rows = [*make_pairs("c1", "Rust?", "Oil it."), *make_pairs("c2", "What is <|im_end|>?", "The end of a turn.")]
    notes = run(rows, tokenizer=smoke).report.notes
    assert "Messages contain the model's own control tokens, which end or open turns (line 2)." in notes
    assert not any("control tokens" in note for note in run(rows[:1], tokenizer=smoke).report.notes)
