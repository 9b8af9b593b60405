"""What must hold of every training set: nothing lost in merging, nothing on both sides, nothing twice."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts.training_set.merge import Pair, merged, per_answer, per_pair
from scripts.training_set.split import held_out_groups

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])

letters = st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"])
words = st.text(letters, min_size=1, max_size=12).filter(str.strip)
conversation = st.lists(words, min_size=2, max_size=9)
sets = st.dictionaries(st.from_regex(r"[a-z]{1,6}", fullmatch=True), conversation, min_size=1, max_size=8)


def pairs_of(texts: list[str]) -> list[Pair]:
    def said(n: int) -> list[dict[str, Any]]:
        return [{"role": "user" if i % 2 == 0 else "assistant", "content": t} for i, t in enumerate(texts[:n])]

    return [Pair(at, said(at), texts[at]) for at in range(1, len(texts), 2)]


def targets(examples: Any) -> list[tuple[str, str]]:
    """(everything before it, answer) of every trained answer."""
    found = []
    for example in examples:
        plain = [(m["role"], m["content"]) for m in example.messages]
        found += [(repr(plain[:i]), m["content"]) for i, m in enumerate(example.messages) if m.get("trained")]
    return found


@QUICK
@given(conversation)
def test_merging_and_splitting_again_gives_the_same_pairs(texts: list[str]) -> None:
    pairs = pairs_of(texts)
    whole = merged(pairs)
    assert whole is not None
    assert targets([whole]) == targets(per_pair(pairs))
    assert [e.messages for e in per_answer(whole)] == [e.messages for e in per_pair(pairs)]


@QUICK
@given(conversation.filter(lambda texts: len(texts) >= 4), st.data())
def test_a_changed_history_is_never_merged(texts: list[str], data: st.DataObject) -> None:
    pairs = pairs_of(texts)
    at = data.draw(st.integers(1, len(pairs) - 1))
    message = data.draw(st.integers(0, 2 * at - 1))
    pairs[at].prompt[message] = pairs[at].prompt[message] | {"content": texts[message] + "!"}
    assert merged(pairs) is None
    assert [answer for _, answer in targets(per_pair(pairs))] == texts[1::2]


@QUICK
@given(sets, st.integers(0, 3), st.sampled_from([0.01, 0.1, 0.3, 0.5]), st.randoms(use_true_random=False))
def test_the_split_does_not_depend_on_the_order_of_the_rows(
    run, make_pairs, texts: dict[str, list[str]], seed: int, fraction: float, shuffle: random.Random
) -> None:
    rows = [row for name, said in texts.items() for row in make_pairs(name, *said)]
    mixed = list(rows)
    shuffle.shuffle(mixed)
    one, two = (run(r, seed=seed, validation_fraction=fraction) for r in (rows, mixed))
    for side in ("train", "valid"):
        contents = [sorted(repr(_plain(e)) for e in getattr(p, side)) for p in (one, two)]
        assert contents[0] == contents[1]
    assert (one.report.conversations, one.report.duplicates) == (two.report.conversations, two.report.duplicates)


@QUICK
@given(sets, st.integers(0, 3), st.sampled_from([0.01, 0.1, 0.3, 0.5]))
def test_no_conversation_and_no_content_is_on_both_sides(run, make_pairs, texts, seed: int, fraction: float) -> None:
    rows = [row for name, said in texts.items() for row in make_pairs(name, *said)]
    prepared = run(rows, seed=seed, validation_fraction=fraction)
    names = [{e["id"].partition("/")[0] for e in side} for side in (prepared.train, prepared.valid)]
    assert not names[0] & names[1]
    for learned in map(_normal, prepared.train):
        for held_out in map(_normal, prepared.valid):
            assert not _one_contains_the_other(learned, held_out)
    assert prepared.train
    assert bool(prepared.valid) != _chained(list(map(_normal, prepared.examples)))


@QUICK
@given(sets)
def test_dropping_duplicates_twice_drops_nothing_more(run, make_pairs, texts) -> None:
    rows = [row for name, said in texts.items() for row in make_pairs(name, *said)]
    again = [row | {"conversation_id": row["conversation_id"] + "-again"} for row in rows]
    once, doubled = run(rows), run(rows + again)
    assert [_plain(e) for e in once.examples] == sorted_like(once.examples, doubled.examples)
    canonical = [{"messages": [_with_weight(m) for m in e["messages"]]} for e in doubled.examples]
    assert run(canonical).report.duplicates == 0
    assert len(run(canonical).examples) == len(doubled.examples)


@QUICK
@given(st.lists(st.integers(1, 9), max_size=12), st.floats(0, 0.5))
def test_whole_groups_are_held_out_and_never_all(sizes: list[int], fraction: float) -> None:
    groups = list(enumerate(sizes))
    chosen = list(held_out_groups(groups, sum(sizes), fraction))
    assert len(set(chosen)) == len(chosen)
    assert bool(chosen) == (fraction > 0 and len(groups) > 1)
    assert len(chosen) < max(len(groups), 1)
    held_out = sum(sizes[root] for root in chosen)
    assert held_out <= max(1, int(fraction * sum(sizes) + 0.5)) or held_out == min(sizes)


@pytest.mark.parametrize("count", [20, 200])
def test_the_share_held_out_is_the_share_asked_for(run, make_pairs, count: int) -> None:
    rows = [row for n in range(count) for row in make_pairs(f"c{n}", f"Question {n}?", "Answer.")]
    sides = [run(rows, seed=seed, validation_fraction=0.15) for seed in (1, 2)]
    assert [len(p.valid) for p in sides] == [round(count * 0.15)] * 2
    assert sides[0].valid != sides[1].valid


def sorted_like(wanted: list[Any], got: list[Any]) -> list[Any]:
    """The messages of `got` in the order of `wanted`: the sides may differ where names do."""
    left = [_plain(e) for e in got]
    return [left.pop(left.index(_plain(e))) for e in wanted] + left


def _plain(example: dict[str, Any]) -> list[Any]:
    return [(m["role"], m["content"], m.get("trained", False)) for m in example["messages"]]


def _normal(example: dict[str, Any]) -> tuple[Any, ...]:
    return tuple((m["role"], " ".join(m["content"].split())) for m in example["messages"])


def _one_contains_the_other(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def _chained(contents: list[tuple[Any, ...]]) -> bool:
    """Whether all contents hang together by containing one another."""
    reached, left = contents[:1], contents[1:]
    for content in reached:
        linked = [other for other in left if _one_contains_the_other(content, other)]
        left = [other for other in left if other not in linked]
        reached += linked
    return not left


def _with_weight(message: dict[str, Any]) -> dict[str, Any]:
    trained = message.pop("trained", False)
    return message | {"weight": int(trained)} if message["role"] == "assistant" else message
