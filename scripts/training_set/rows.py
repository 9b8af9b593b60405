"""Rows, as bytes and as the types of every supported form: decoding a line into one of these is the schema check.

Keys that are not named here are skipped by the decoder, so emotional states, strategies and `_meta` never get further.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from msgspec import UNSET, Raw, Struct, UnsetType

Name = str | int | None


class RawRow(NamedTuple):
    """One row as bytes, and where it stands."""

    line: int
    offset: int
    data: bytes
    conversation: str | None = None
    "The name of the conversation that surrounds it, if any."
    label: str = ""
    "Its place inside a JSON document, such as training_pairs[3]; empty in JSON Lines."


class HistoryTurn(Struct, gc=False):
    """One turn of a pair's history. Hand-written files leave `role` out, or write {"turn", "assistant"}."""

    role: str | None = None
    content: str | None = None


class ConversationName(Struct, gc=False):
    """Metadata of which only the conversation's name is of use."""

    conversation_id: Name = None


class PairRow(Struct, gc=False):
    """One question and its answer, with everything said before. Shared by forms (a) to (e)."""

    target_response: str | None
    current_user_input: str | None = None
    conversation_history: list[HistoryTurn] | None = None
    system_prompt: str | None = None
    conversation_id: Name = None
    conversation_metadata: ConversationName | None = None
    turn_number: int | None = None


class Part(Struct, gc=False):
    """A part of a message's content; only text can be trained on."""

    type: str
    text: str | None = None


class Function(Struct, gc=False):
    """The function of a tool call. OpenAI writes `arguments` as JSON text, others as an object."""

    name: str
    arguments: str | dict[str, Any] = ""


class ToolCall(Struct, gc=False):
    """A call of a tool by the assistant."""

    function: Function
    id: str | None = None
    type: str | None = None


class ChatMessage(Struct, gc=False):
    """One message of forms (f), (g), (h) and of prompt and completion lists."""

    role: str
    content: str | list[Part] | None = None
    weight: float | None = None
    turn_number: int | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    function_call: Any = None


class Answers(Struct, gc=False, kw_only=True):
    """The keys by which preference data shows itself inside another form."""

    chosen: Any = None
    rejected: Any = None


class MessagesRow(Answers, gc=False, kw_only=True):
    """Form (h): OpenAI's chat form."""

    messages: list[ChatMessage]
    tools: list[dict[str, Any]] | None = None
    functions: Any = None
    metadata: ConversationName | None = None
    conversation_id: Name = None


class TurnsRow(Struct, gc=False):
    """Forms (f) and (g): turns, in the order of `turn_number` where all have one."""

    turns: list[ChatMessage]
    conversation_id: Name = None
    conversation_metadata: ConversationName | None = None
    system_prompt: str | None = None


class ShareTurn(Struct, gc=False, rename={"speaker": "from"}):
    """One turn of the ShareGPT form."""

    speaker: str
    value: str | None
    weight: float | None = None


class ShareRow(Answers, gc=False, kw_only=True):
    """The ShareGPT form."""

    conversations: list[ShareTurn]
    system: str | None = None
    tools: Any = None
    id: Name = None
    conversation_id: Name = None


class AlpacaRow(Answers, gc=False, kw_only=True):
    """The Alpaca form: an instruction, perhaps an input, and the output; `history` holds earlier [question, answer]."""

    instruction: str
    output: str | None
    input: str | None = None
    system: str | None = None
    history: list[tuple[str, str]] | None = None
    conversation_id: Name = None


class PromptRow(Answers, gc=False, kw_only=True):
    """Prompt and completion, each a text or a list of messages."""

    prompt: str | list[ChatMessage]
    completion: str | list[ChatMessage] | None
    label: Any = None
    tools: list[dict[str, Any]] | None = None
    conversation_id: Name = None


Row = PairRow | MessagesRow | TurnsRow | ShareRow | AlpacaRow | PromptRow


class ConversationObject(Struct, gc=False):
    """One entry of form (a)'s `conversations`."""

    training_pairs: list[Raw] | UnsetType = UNSET
    conversation_metadata: ConversationName | None = None


class DocumentObject(Struct, gc=False):
    """A whole file that is one JSON object: forms (a), (d), (e)."""

    conversations: list[Raw] | UnsetType = UNSET
    training_pairs: list[Raw] | UnsetType = UNSET
    dataset_metadata: ConversationName | None = None
    conversation_metadata: ConversationName | None = None


class MetaCounts(Struct, gc=False):
    """What the header of a form (b) or (c) file says about it."""

    total_pairs: int | None = None
