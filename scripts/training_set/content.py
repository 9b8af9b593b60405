"""What makes two examples the same: a hash of their messages, blind to white space and to composed characters."""

from __future__ import annotations

import hashlib
import unicodedata

import msgspec

from scripts.training_set.merge import Example

_encode = msgspec.json.Encoder(order="sorted").encode


def beginnings(example: Example) -> list[bytes]:
    """The hash of the example up to each of its assistant messages; the last is the hash of the whole.

    An example whose hash is among another's beginnings is contained in it.
    """
    running = hashlib.blake2b(_encode(example.tools), digest_size=16)
    result = []
    for message in example.messages:
        text = " ".join(unicodedata.normalize("NFC", message["content"]).split())
        running.update(_encode([message["role"], text, message.get("tool_calls")]))
        if message["role"] == "assistant":
            result.append(running.digest())
    return result
