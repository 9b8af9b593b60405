"""What people get wrong in a recipe, and the exact sentences they read: bad_recipes.txt is the list."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.errors import InputError
from recipes.load import load_recipe

SOUND = """\
base:
  id: Qwen/Qwen3-8B
adapter:
  rank: 16
  alpha: 32
  targets: [attention, mlp]
data:
  max_tokens: 4096
training:
  epochs: 3
  global_batch: 8
  micro_batch: 1
  learning_rate: 2e-4
hardware:
  engine: zero3
  backends: [runpod_pod]
limits:
  max_usd: 10
"""


def _cases() -> list[tuple[str, str]]:
    text = Path(__file__).with_name("bad_recipes.txt").read_text()
    blocks = text.split("\n--- ")[1:]
    return [(block.partition("\n")[0], block.partition("\n")[2].strip("\n")) for block in blocks]


def _changed(change: str) -> str:
    old, arrow, new = (change.replace("\\n", "\n").replace("\\t", "\t")).partition(" -> ")
    assert arrow, change
    assert old in SOUND, change
    return SOUND.replace(old, new, 1)


def _problems(path: Path) -> list[str]:
    with pytest.raises(InputError) as caught:
        load_recipe(str(path))
    assert caught.value.exit_code == 2
    return [str(problem).removeprefix(f"{path}").removeprefix(":") for problem in caught.value.problems]


def test_the_sound_recipe_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "sound.yaml").write_text(SOUND)
    assert load_recipe(str(tmp_path / "sound.yaml")).recipe.training.learning_rate == 2e-4


def test_the_list_of_bad_recipes_is_long() -> None:
    cases = _cases()
    assert len(cases) >= 60
    assert len({change for change, _ in cases}) == len(cases)


@pytest.mark.parametrize(("change", "expected"), _cases(), ids=lambda text: text[:50])
def test_bad_recipe_is_refused_with_these_sentences(change: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(_changed(change))
    assert "\n".join(_problems(path)) == expected


def test_all_problems_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "base: {id: Qwen/Qwen3-9B}\n"
        "adapter: {rank: 0, targets: [attention, shared_expert], dropout: 0.1}\n"
        "training: {learning_rate: high}\n"
        "hardware: {gpu: h100-sxn}\n"
        "limits: {max_usd: -1}\n"
    )
    assert _problems(path) == [
        "2: adapter.rank: 0; 1 or more",
        "2: adapter.dropout: unknown key; known keys: rank, alpha, targets, expert_layout",
        "3: training.learning_rate: 'high'; a number",
        "5: limits.max_usd: -1; more than 0",
        "1: base.id: unknown model 'Qwen/Qwen3-9B'; did you mean 'Qwen/Qwen3-8B'?",
        "4: hardware.gpu: unknown GPU 'h100-sxn'; did you mean 'h100-sxm'?",
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "an empty file"),
        (b"# nothing\n", "an empty file"),
        (b"- a\n- b\n", "a mapping of keys to values"),
        (b"just text", "a mapping of keys to values"),
        (b"{", "not valid YAML"),
        (b"\x00", "save the file as UTF-8"),
        (b"\xff\xfe\x00", "not UTF-8 text at byte 0"),
        (b"[" * 3000, "at most 12 levels"),
        (b"x: " + b"{a: " * 40 + b"1" + b"}" * 40, "more than 12 levels deep"),
        (b"a: &a [1]\nb: [*a, *a]\n", "an alias (*name)"),
        (b"%YAML 9.9\n---\na: 1", "not valid YAML"),
        (b'"\\x"', "not valid YAML"),
        (b"a" * 300_000, "at most 262144 bytes"),
        (SOUND.encode() + b"---\na: 1\n", "another document"),
        (b"a: !!python/object/apply:os.system [ls]\n", "the tag"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_file_that_is_no_recipe_is_refused(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    assert expected in "\n".join(_problems(path))


def test_missing_file_names_the_nearest_recipe() -> None:
    with pytest.raises(InputError, match=r"no recipe 'smoke/zero2'; did you mean 'smoke/zero3'\?"):
        load_recipe("smoke/zero2")


def test_folder_in_place_of_a_recipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(InputError, match="no recipe"):
        load_recipe(str(tmp_path / "folder.yaml"))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_damage_to_a_recipe_ends_in_anything_but_a_sentence(tmp_path_factory: pytest.TempPathFactory, data) -> None:
    text = SOUND
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 20)))
        text = text[:start] + data.draw(st.text(max_size=8) | st.sampled_from("{}[]:,&*!|>'\"%@`-?#\t\n ")) + text[end:]
    path = tmp_path_factory.getbasetemp() / "damaged.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    problems = []
    try:
        load_recipe(str(path))
    except InputError as error:
        problems = error.problems
    assert all(problem.where.startswith(str(path)) and problem.got and problem.want for problem in problems)
