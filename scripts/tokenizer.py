"""The model's own tokenizer and chat template, read from files at hand: no network, no model code.

tokenizer = find_tokenizer("lorry/smoke", settings.tokenizers)
text = tokenizer.render([{"role": "user", "content": "hi"}], True, None)
ids, spans = tokenizer.encode(text)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from recipes.chat import Message, NotTrainable
from recipes.errors import InputError, Problem

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SMOKE = Path(__file__).parent.parent / "recipes" / "smoke" / "model"
SMOKE_ID = "lorry/smoke"

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_HIDDEN = ("trained",)  # our own mark; a template has no business with it


@dataclass(frozen=True)
class ChatTokenizer:
    """One model's way from messages to token ids."""

    name: str
    end_ids: frozenset[int]
    "Tokens that end a turn of the assistant."
    control_tokens: tuple[str, ...]
    "Texts that become special tokens wherever they stand."
    _tokenizer: Tokenizer
    _templates: dict[str, jinja2.Template]
    _special: dict[str, str]

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool, tools: Sequence[dict[str, Any]] | None = None
    ) -> str:
        """The conversation as the model reads it. Raises NotTrainable with the template's own words if it refuses."""
        plain = [{k: v for k, v in m.items() if v is not None and k not in _HIDDEN} for m in messages]
        template = self._templates.get("tool_use" if tools else "default") or self._templates["default"]
        try:
            text: str = template.render(
                messages=plain,
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=False,
                **self._special,
            )
            return text
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise NotTrainable(f"the chat template refuses it ({error})") from None

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and the span of characters each stands for. Adds no special tokens: the template writes them."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these tokens, special tokens included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


def find_tokenizer(model_id: str, roots: Sequence[Path]) -> ChatTokenizer | None:
    """The tokenizer of a model, or None where no folder holds its files.

    Looks in the repository for the smoke model, else in each root for `<org>--<name>/` (staged by Lorry) and
    `models--<org>--<name>/snapshots/<revision>/` (the Hugging Face cache). Raises InputError for files that are broken.
    """
    for folder in _folders(model_id, roots):
        if (folder / "tokenizer.json").is_file() and (folder / "tokenizer_config.json").is_file():
            found = _load(model_id, folder)
            if found is not None:
                return found
    return None


def _folders(model_id: str, roots: Sequence[Path]) -> list[Path]:
    if any(part in ("", ".", "..") for part in model_id.split("/")):
        return []
    folders = [SMOKE] if model_id == SMOKE_ID else []
    name = model_id.replace("/", "--")
    for root in roots:
        cached = root / f"models--{name}"
        main = cached / "refs" / "main"
        revisions = [main.read_text(encoding="utf-8").strip()] if main.is_file() else []
        snapshots = cached / "snapshots"
        others = sorted(path.name for path in snapshots.iterdir()) if snapshots.is_dir() else []
        folders += [root / name, *(snapshots / revision for revision in dict.fromkeys(revisions + others))]
    return folders


def _load(model_id: str, folder: Path) -> ChatTokenizer | None:
    from tokenizers import Tokenizer  # not loaded by verbs that count no tokens

    config = _read_json(folder / "tokenizer_config.json")
    sources = _template_sources(folder, config)
    if "default" not in sources:
        return None
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError(
            Problem(str(folder / "tokenizer.json"), f"broken ({error})", "fetch the model again")
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    special = {key: text for key in _SPECIAL if (text := _token_text(config.get(key)))}
    environment = _environment()
    try:
        templates = {name: environment.from_string(source) for name, source in sources.items()}
    except jinja2.TemplateError as error:
        raise InputError(Problem(str(folder), f"a broken chat template ({error})", "fetch the model again")) from None
    controls = tuple(token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special)
    return ChatTokenizer(model_id, _end_ids(folder, special, tokenizer), controls, tokenizer, templates, special)


def _template_sources(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Templates by name; a .jinja file wins over tokenizer_config.json, as in transformers 5."""
    written = config.get("chat_template")
    if isinstance(written, list):
        sources = {entry["name"]: entry["template"] for entry in written}
    else:
        sources = {"default": written} if isinstance(written, str) else {}
    file = folder / "chat_template.jinja"
    return {"default": file.read_text(encoding="utf-8")} if file.is_file() else sources


def _end_ids(folder: Path, special: dict[str, str], tokenizer: Tokenizer) -> frozenset[int]:
    """The tokenizer's eos token, and those that generation stops at."""
    ids: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        stops = _read_json(folder / name).get("eos_token_id") if (folder / name).is_file() else None
        ids.update(stops if isinstance(stops, list) else [stops] if isinstance(stops, int) else [])
    eos = tokenizer.token_to_id(special["eos_token"]) if "eos_token" in special else None
    return frozenset(ids if eos is None else ids | {eos})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(Problem(str(path), f"not readable ({error})", "fetch the model again")) from None
    return value if isinstance(value, dict) else {}


def _token_text(value: object) -> str | None:
    return value.get("content") if isinstance(value, dict) else value if isinstance(value, str) else None


class _Generation(Extension):  # type: ignore[misc]
    """{% generation %} ... {% endgeneration %} marks the assistant's part; here it only renders what it holds."""

    tags = frozenset({"generation"})

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _environment() -> ImmutableSandboxedEnvironment:
    """The dialect of Jinja that chat templates are written in, as transformers 5.23 sets it up."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter escapes HTML; the models were trained on text without that."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
