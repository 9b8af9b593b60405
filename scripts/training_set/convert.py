"""From a typed row to messages: what reaches the chat template is role and content, tools and their calls. Pure.

Every function returns None for a row that is left out, and says why in `findings`; it raises Unusable for a row that
refuses the set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from scripts.training_set.findings import Findings, Unusable
from scripts.training_set.merge import Example, Message, Pair
from scripts.training_set.rows import (
    AlpacaRow,
    ChatMessage,
    MessagesRow,
    Name,
    PairRow,
    PromptRow,
    ShareRow,
    ShareTurn,
    ToolCall,
    TurnsRow,
)

ROLES = ("system", "user", "assistant", "tool")
SHARE_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}

PREFERENCE = "preference data (better and worse answers)"
KEEP_CHOSEN = "Lorry learns from good answers alone: keep the good answer of each row, as OpenAI messages"

NO_ANSWER = "no answer (a record of the user's turn)"
NO_QUESTION = "an empty question"
ONLY_EMPTY = "every answer is empty"
DOUBLED = "doubled question"
ROLELESS = "history without roles"
EMPTY_ANSWER = "empty answer"
CUT = "messages after the last answer"
OPENING = "opening answer"
CONTROL = "control tokens in text"


def conversation_name(row: Any) -> str | None:
    """The name of the conversation that a row belongs to, from its own keys or its metadata."""
    for holder in (row, getattr(row, "conversation_metadata", None), getattr(row, "metadata", None)):
        name: Name = getattr(holder, "conversation_id", None)
        if name is not None:
            return str(name)
    return None


def to_pair(row: PairRow, line: int, findings: Findings) -> Pair | None:
    """A pair's prompt and answer. The history's last message is dropped where it is the current question again."""
    if _blank(row.target_response):
        findings.skip(NO_ANSWER, line)
        return None
    prompt = [] if _blank(row.system_prompt) else [_message("system", row.system_prompt)]
    history = row.conversation_history or []
    if any(turn.role is None for turn in history):
        findings.note(ROLELESS, line)
        history = []
    for at, turn in enumerate(history):
        place = f"conversation_history[{at}]"
        _check_role(turn.role, f"{place}.role")
        if turn.content is None:
            raise Unusable("null or missing", "text", f"{place}.content")
        prompt.append(_message(str(turn.role), turn.content))
    question = row.current_user_input
    if history and history[-1].role == "assistant" and _same(history[-1].content, question):
        got = "the current question as the assistant's message"
        raise Unusable(got, "roles as they were spoken", f"conversation_history[{len(history) - 1}].role")
    asked_before = bool(prompt) and prompt[-1]["role"] == "user"
    if _blank(question):
        if not asked_before:
            findings.skip(NO_QUESTION, line)
            return None
    else:
        if asked_before and _same(prompt[-1]["content"], question):
            prompt.pop()
            findings.note(DOUBLED, line)
        prompt.append(_message("user", question))
    return Pair(line, prompt, str(row.target_response))


def to_example(row: Any, line: int, findings: Findings) -> Example | None:
    """A row that holds a whole conversation, of any form but the pair's, as an example."""
    tools: list[dict[str, Any]] | None = None
    if not isinstance(row, TurnsRow) and (row.chosen is not None or row.rejected is not None):
        raise Unusable(PREFERENCE, KEEP_CHOSEN)
    if isinstance(row, MessagesRow):
        if row.functions is not None:
            raise Unusable("the outdated key", "write `tools` and `tool_calls`", "functions")
        messages, tools = _chat(row.messages, "messages"), row.tools
    elif isinstance(row, TurnsRow):
        turns = row.turns
        if all(turn.turn_number is not None for turn in turns):
            turns = sorted(turns, key=lambda turn: turn.turn_number or 0)
        messages = _system(row.system_prompt) + _chat(turns, "turns")
    elif isinstance(row, ShareRow):
        if row.tools not in (None, "", "[]", []):
            raise Unusable("tools in the ShareGPT form", "write conversations with tools as OpenAI messages", "tools")
        messages = _system(row.system) + _share(row.conversations)
    elif isinstance(row, AlpacaRow):
        messages = _alpaca(row)
    else:
        messages, tools = _prompt(row), row.tools
    return _settled(messages, tools or None, line, findings)


def _settled(messages: list[Message], tools: list[dict[str, Any]] | None, line: int, f: Findings) -> Example | None:
    """Decides what is trained, and cuts what stands after the last trained answer: nothing is learned from it."""
    if not any(m["role"] == "assistant" for m in messages):
        raise Unusable("no assistant message", "at least one answer to learn from")
    if all(m["trained"] is False for m in messages if m["role"] == "assistant"):
        raise Unusable("every assistant message has weight 0", "at least one answer to learn from")
    if any(m["role"] == "user" and _blank(m["content"]) for m in messages):
        f.skip(NO_QUESTION, line)
        return None
    asked = opening = False
    last = -1
    settled: list[Message] = []
    for at, message in enumerate(messages):
        wanted = message.pop("trained", True) and message["role"] == "assistant"
        if wanted and not message.get("tool_calls") and _blank(message["content"]):
            f.note(EMPTY_ANSWER, line)
            wanted = False
        elif wanted and not asked:
            opening, wanted = True, False
        asked = asked or message["role"] == "user"
        last = at if wanted else last
        settled.append(message | {"trained": True} if wanted else message)
    if last < 0 and opening:
        raise Unusable("its only answers stand before any question", "the user's message first, then the answer")
    if last < 0:
        f.skip(ONLY_EMPTY, line)
        return None
    if opening:
        f.note(OPENING, line)
    if last + 1 < len(settled):
        f.note(CUT, line)
    return Example(line, settled[: last + 1], tools)


def _chat(messages: Sequence[ChatMessage], key: str) -> list[Message]:
    result = []
    for at, message in enumerate(messages):
        place = f"{key}[{at}]"
        _check_role(message.role, f"{place}.role")
        if message.function_call is not None:
            raise Unusable("the outdated key", "write `tool_calls`", f"{place}.function_call")
        plain = _message(message.role, _text(message, place))
        if message.role == "assistant":
            plain["trained"] = _weight(message.weight, f"{place}.weight")
            if message.tool_calls:
                plain["tool_calls"] = [
                    _call(call, f"{place}.tool_calls[{n}]") for n, call in enumerate(message.tool_calls)
                ]
        if message.role == "tool" and message.tool_call_id is not None:
            plain["tool_call_id"] = message.tool_call_id
        if message.role == "tool" and message.name is not None:
            plain["name"] = message.name
        result.append(plain)
    return result


def _text(message: ChatMessage, place: str) -> str:
    if isinstance(message.content, list):
        for at, part in enumerate(message.content):
            if part.type != "text" or part.text is None:
                raise Unusable(f"a part of type '{part.type}'", "text parts only", f"{place}.content[{at}]")
        return "".join(part.text or "" for part in message.content)
    if message.content is None and message.role != "assistant":
        raise Unusable("null or missing", "text", f"{place}.content")
    return message.content or ""


def _call(call: ToolCall, place: str) -> dict[str, Any]:
    """A tool call with its arguments as an object, which is what chat templates expect."""
    arguments = call.function.arguments
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments or "{}", type=dict[str, Any])
        except (ValueError, RecursionError):
            raise Unusable(
                "text that is no JSON object", "the arguments as a JSON object", f"{place}.function.arguments"
            ) from None
    plain: dict[str, Any] = {"type": "function", "function": {"name": call.function.name, "arguments": arguments}}
    return plain if call.id is None else {"id": call.id} | plain


def _share(turns: Sequence[ShareTurn]) -> list[Message]:
    result = []
    for at, turn in enumerate(turns):
        place = f"conversations[{at}]"
        if turn.speaker not in SHARE_ROLES:
            known = ", ".join(SHARE_ROLES)
            raise Unusable(f"'{turn.speaker}'", f"one of {known}; tools need OpenAI messages", f"{place}.from")
        role = SHARE_ROLES[turn.speaker]
        if turn.value is None and role != "assistant":
            raise Unusable("null", "text", f"{place}.value")
        plain = _message(role, turn.value or "")
        if role == "assistant":
            plain["trained"] = _weight(turn.weight, f"{place}.weight")
        result.append(plain)
    return result


def _alpaca(row: AlpacaRow) -> list[Message]:
    messages = _system(row.system)
    for question, answer in row.history or []:
        messages += [_message("user", question), _message("assistant", answer) | {"trained": True}]
    asked = row.instruction if _blank(row.input) else f"{row.instruction}\n\n{row.input}"
    return [*messages, _message("user", asked), _message("assistant", row.output or "") | {"trained": True}]


def _prompt(row: PromptRow) -> list[Message]:
    if row.label is not None:
        raise Unusable(PREFERENCE, KEEP_CHOSEN)
    if isinstance(row.prompt, str):
        messages = [_message("user", row.prompt)]
    else:
        messages = _chat(row.prompt, "prompt")
        for message in messages:
            message.update({"trained": False} if message["role"] == "assistant" else {})
    if isinstance(row.completion, list):
        return messages + _chat(row.completion, "completion")
    return [*messages, _message("assistant", row.completion or "") | {"trained": True}]


def _system(text: str | None) -> list[Message]:
    return [] if _blank(text) else [_message("system", text)]


def _message(role: str, content: str | None) -> Message:
    return {"role": role, "content": content or ""}


def _check_role(role: str | None, place: str) -> None:
    if role not in ROLES:
        raise Unusable(f"the role '{role}'", f"one of {', '.join(ROLES)}", place)


def _weight(weight: float | None, place: str) -> bool:
    if weight not in (None, 0, 1):
        raise Unusable(f"{weight}", "0 (context only) or 1 (trained)", place)
    return weight != 0


def _same(one: str | None, other: str | None) -> bool:
    """White space around a message is not part of it."""
    return one is not None and other is not None and one.strip() == other.strip()


def _blank(text: str | None) -> bool:
    return text is None or not text.strip()
