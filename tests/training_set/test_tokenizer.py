"""The chat tokenizer renders and encodes exactly what transformers does, on templates of several shapes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from recipes.chat import NotTrainable, prefix_stable, tokenise
from recipes.errors import InputError
from scripts.tokenizer import SMOKE, find_tokenizer

TOOL = {"type": "function", "function": {"name": "part", "description": "a < b", "parameters": {"type": "object"}}}
BOS = {"__type": "AddedToken", "content": "<|endoftext|>"} | dict.fromkeys(("lstrip", "rstrip", "normalized"), False)
CALL = {"type": "function", "function": {"name": "part", "arguments": {"name": "Br\u00fccke <1>"}}}
PLAIN = [
    {"role": "user", "content": " Rust? <b>\n"},
    {"role": "assistant", "content": "Oil it. \u00df \U0001f6b2 "},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "<think>hm</think>\n\nWipe it."},
]
CONVERSATIONS = {
    "one question": (PLAIN[:1], True, None),
    "plain": (PLAIN[:2], False, None),
    "several turns": (PLAIN, False, None),
    "several turns, next answer": (PLAIN[:3], True, None),
    "system": ([{"role": "system", "content": "Be brief."}, *PLAIN], False, None),
    "tools": (
        [
            PLAIN[0],
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": '{"stock": 4}', "name": "part"},
            {"role": "assistant", "content": "Four."},
        ],
        False,
        [TOOL],
    ),
}

# Written for this test in the shapes of well-known families: a default system prompt, a thought that is dropped from
# earlier turns, strict alternation with bos and eos, and a dated header with loop controls.
TEMPLATES = {
    "default system prompt": (
        "{%- if messages[0]['role'] == 'system' %}"
        "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
        "{%- else %}{{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{%- endif %}\n"
        "{%- if tools %}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{%- endif %}\n"
        "{%- for message in messages %}\n"
        "    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) or "
        "(message.role == 'assistant' and not message.tool_calls) %}\n"
        "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
        "    {%- elif message.role == 'assistant' %}\n"
        "        {%- for call in message.tool_calls %}{{- call.function.arguments | tojson }}{%- endfor %}\n"
        "        {{- '<|im_end|>\\n' }}\n"
        "    {%- elif message.role == 'tool' %}{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}\n"
    ),
    "drops earlier thoughts": (
        "{%- set ns = namespace(last=-1) %}\n"
        "{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}\n"
        "    {%- if message.role == 'user' and ns.last < 0 %}{%- set ns.last = index %}{%- endif %}\n"
        "{%- endfor %}\n"
        "{%- for message in messages %}\n"
        "    {%- if message.role == 'assistant' %}\n"
        "        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}\n"
        "        {{- '<|im_start|>assistant\\n' }}\n"
        "        {%- if loop.index0 > ns.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}\n"
        "        {{- content + '<|im_end|>\\n' }}\n"
        "    {%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}\n"
        "    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}"
        "{%- endif %}\n{%- endif %}\n"
    ),
    "strict alternation": (
        "{{- bos_token }}\n"
        "{%- for message in messages if message.role != 'system' %}\n"
        "    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}\n"
        "        {{- raise_exception('Conversation roles must alternate user/assistant/...') }}\n"
        "    {%- endif %}\n"
        "    {%- if message.role == 'user' %}{{- ' [INST] ' + message.content + ' [/INST]' }}\n"
        "    {%- else %}{% generation %}{{- ' ' + message.content + eos_token }}{% endgeneration %}{%- endif %}\n"
        "{%- endfor %}\n"
    ),
    "loop controls and date": (
        "{{ strftime_now('%Y') }}\n"
        "{% for message in messages %}{% if loop.index > 2 %}{% break %}{% endif %}\n"
        "  {% if message.role == 'system' %}{% continue %}{% endif %}\n"
        "<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n"
        "{% endfor %}\n"
    ),
    "several templates": [
        {"name": "default", "template": "{% for m in messages %}{{ m.content }}{% endfor %}"},
        {
            "name": "tool_use",
            "template": "{{ tools | tojson(indent=2) }}{% for m in messages %}{{ m.role }}{% endfor %}",
        },
    ],
}


@pytest.fixture(params=["smoke", *TEMPLATES], scope="module")
def both(request, tmp_path_factory):
    """(our tokenizer, transformers' tokenizer) of one model folder."""
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("models")
    folder = root / "some--model"
    shutil.copytree(SMOKE, folder)
    if request.param != "smoke":
        (folder / "chat_template.jinja").unlink()
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config |= {"chat_template": TEMPLATES[request.param], "bos_token": BOS}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours = find_tokenizer("some/model", [root])
    assert ours is not None
    return ours, PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_rendering_and_encoding_equal_transformers(both, name: str) -> None:
    ours, theirs = both
    messages, generation, tools = CONVERSATIONS[name]

    def wanted() -> str:
        return theirs.apply_chat_template(
            messages, tools=tools, add_generation_prompt=generation, tokenize=False, enable_thinking=False
        )

    try:
        text = wanted()
    except Exception as error:
        refusal = re.escape(f"the chat template refuses it ({error})")
        with pytest.raises(NotTrainable, match=refusal):
            ours.render(messages, generation, tools)
        return
    assert ours.render(messages, generation, tools) == text
    assert ours.encode(text)[0] == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ours.encode(text)[0]) == text


def test_a_strict_template_really_refuses_in_this_test(both) -> None:
    """Guards the test above against templates that refuse everything: the plain conversation always renders."""
    ours, theirs = both
    assert ours.render(PLAIN[:2], False) == theirs.apply_chat_template(PLAIN[:2], tokenize=False, enable_thinking=False)


def test_the_trained_mark_never_reaches_the_template(tmp_path: Path) -> None:
    ours = _model(tmp_path, "{{ messages | tojson }}")
    assert "trained" not in ours.render([{"role": "assistant", "content": "x", "trained": True}], False)


def test_the_hugging_face_cache_is_searched_main_revision_first(tmp_path: Path) -> None:
    cached = tmp_path / "models--some--model"
    for revision, template in (("aaa", "first"), ("bbb", "second")):
        shutil.copytree(SMOKE, cached / "snapshots" / revision)
        (cached / "snapshots" / revision / "chat_template.jinja").write_text(template)
    assert find_tokenizer("some/model", [tmp_path]).render(PLAIN, False) == "first"
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("bbb\n")
    assert find_tokenizer("some/model", [tmp_path]).render(PLAIN, False) == "second"


def test_a_model_that_is_not_at_hand_has_no_tokenizer(tmp_path: Path) -> None:
    assert find_tokenizer("some/model", [tmp_path, tmp_path / "missing"]) is None
    assert find_tokenizer("../../etc", [tmp_path]) is None
    assert find_tokenizer("lorry/smoke", []) is not None


def test_a_folder_without_a_chat_template_is_no_chat_tokenizer(tmp_path: Path) -> None:
    shutil.copytree(SMOKE, tmp_path / "some--model")
    (tmp_path / "some--model" / "chat_template.jinja").unlink()
    assert find_tokenizer("some/model", [tmp_path]) is None


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_broken_tokenizer_file_is_named(tmp_path: Path, name: str) -> None:
    shutil.copytree(SMOKE, tmp_path / "some--model")
    (tmp_path / "some--model" / name).write_text("{% if")
    with pytest.raises(InputError, match="fetch the model again"):
        find_tokenizer("some/model", [tmp_path])


def test_the_end_of_a_turn_is_known(smoke) -> None:
    assert [smoke.decode([token]) for token in smoke.end_ids] == ["<|im_end|>"]


def test_a_template_cannot_reach_into_python(tmp_path: Path) -> None:
    ours = _model(tmp_path, "{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(NotTrainable, match="refuses"):
        ours.render(PLAIN, False)


def test_a_template_that_drops_thoughts_gives_one_example_per_answer(run, make_pairs, tmp_path: Path) -> None:
    ours = _model(tmp_path, TEMPLATES["drops earlier thoughts"])
    assert not prefix_stable(ours.render)
    rows = make_pairs("c1", "Rust?", "Oil it.", "And then?", "Wipe it.")
    chat = {"messages": [{k: v for k, v in m.items() if k != "trained"} for m in run(rows).examples[0]["messages"]]}
    for prepared in (run(rows, tokenizer=ours), run([chat], tokenizer=ours)):
        assert [[m.get("trained", False) for m in e["messages"]] for e in prepared.examples] == [
            [False, False, True],
            [False, False, False, False, True],
        ]
        for example in prepared.examples:
            tokens = tokenise(example["messages"], ours.render, ours.encode, ours.end_ids)
            trained = ours.decode([i for i, t in zip(tokens.ids, tokens.trained, strict=True) if t])
            assert trained == example["messages"][-1]["content"] + "<|im_end|>"
    assert run(rows, tokenizer=ours).report.per_pair == 1


def test_a_conversation_that_the_template_refuses_is_named_by_line(run, tmp_path: Path) -> None:
    ours = _model(tmp_path, TEMPLATES["strict alternation"])
    good = {"messages": PLAIN[:2]}
    doubled = {"messages": [PLAIN[0], PLAIN[2], PLAIN[1]]}
    with pytest.raises(InputError) as caught:
        run([good, doubled], tokenizer=ours)
    (problem,) = caught.value.problems
    assert problem.where == "set.jsonl:2"
    assert "roles must alternate" in problem.got
    assert "some/model" in problem.want


def _model(root: Path, template: str):
    shutil.copytree(SMOKE, root / "some--model")
    (root / "some--model" / "chat_template.jinja").write_text(template)
    config = json.loads((SMOKE / "tokenizer_config.json").read_text()) | {"bos_token": "<|endoftext|>"}
    (root / "some--model" / "tokenizer_config.json").write_text(json.dumps(config))
    return find_tokenizer("some/model", [root])
