"""Whole files that are no training set, or only look like one: refused in our words, never with a traceback."""

from __future__ import annotations

import gzip
import io
import random
import zipfile
from pathlib import Path

import pytest

from recipes.errors import InputError, Problem

FORMS = Path(__file__).parent.parent.parent / "examples" / "forms"
NOT_JSON = r"set.jsonl:\d+:\d+: not valid JSON"


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    return buffer.getvalue()


DOCUMENT = (FORMS / "single-conversation.json").read_bytes()
FULL = (FORMS / "full-export.json").read_bytes()
HTML = b"<!DOCTYPE html><html><body>Link expired</body></html>"
ONLY_QUESTIONS = FULL.replace(b'"target_response": "', b'"target_response": null, "x": "')

FILES = [
    ("empty file", b"", "an empty file"),
    ("white space", b" \n\r\n\t", "an empty file"),
    ("byte order mark alone", b"\xef\xbb\xbf", "an empty file"),
    ("null bytes", b"\0" * 64, "not JSON"),
    ("CSV", b"question,answer\nRust?,Oil it.\n", "a table"),
    ("CSV with semicolons", b"question;answer\nRust?;Oil it.\n", "a table"),
    ("YAML", b"messages:\n  - role: user\n", "not JSON"),
    ("prose", b"Once upon a time\nthere was a bicycle.\n", "not JSON"),
    ("PDF", b"%PDF-1.7\n%\xe2\xe3", "a PDF"),
    ("zip or Excel", _zip(), "a zip archive"),
    ("gzip", gzip.compress(DOCUMENT), "a gzip file"),
    ("Parquet", b"PAR1\x15\x04", "a Parquet file"),
    ("web page", HTML, "a web page"),
    ("UTF-16 with mark", DOCUMENT.decode().encode("utf-16"), "UTF-16"),
    ("UTF-16 without mark", DOCUMENT.decode().encode("utf-16-le"), "UTF-16"),
    ("UTF-32", DOCUMENT.decode().encode("utf-32-le"), "UTF-16 or UTF-32"),
    ("empty array", b"[]", "no examples"),
    ("array of numbers", b"[1, 2]", "not an object"),
    ("DPO array", b'[{"prompt": "a", "chosen": "b", "rejected": "c"}]', "preference data"),
    ("document without its end", DOCUMENT[:-20], "ends too early"),
    ("document with a stray backslash", DOCUMENT.replace(b'"turn_number": 2', b'"turn_number": 2\\'), NOT_JSON),
    ("document with a bare word", DOCUMENT.replace(b"null", b"none"), NOT_JSON),
    ("two documents", DOCUMENT + DOCUMENT, NOT_JSON),
    ("pairs are no list", b'{"training_pairs": {"a": 1}}', "training_pairs: an object"),
    ("no pairs", b'{"training_pairs": []}', "no examples"),
    ("a conversation without pairs", FULL.replace(b'"training_pairs"', b'"pairs"', 1), r"conversations\[0\]"),
    ("a null conversation", b'{"conversations": [null, {"training_pairs": []}]}', "null"),
    ("only null targets", ONLY_QUESTIONS, "no usable example"),
    ("nested document", b"[" * 5000 + b"]" * 5000, "nested"),
]


@pytest.mark.parametrize(("content", "words"), [case[1:] for case in FILES], ids=[case[0] for case in FILES])
def test_file_is_refused_with_what_it_is_and_what_would_be_right(run, content: bytes, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        run(content)
    assert caught.value.exit_code == 2
    assert all(p.where.startswith("set.jsonl") and p.got and p.want for p in caught.value.problems)


@pytest.mark.parametrize("name", sorted(path.name for path in FORMS.iterdir()))
def test_random_damage_never_ends_in_a_traceback(run, name: str) -> None:
    """Flips, cuts and doubles bytes: the set is taken or refused in our words, whatever it then holds."""
    whole = (FORMS / name).read_bytes()
    rng = random.Random(name)
    found: list[Problem] = []
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(damaged))
            what = rng.randrange(4)
            if what == 0:
                damaged[at] = rng.randrange(256)
            elif what == 1:
                del damaged[at : at + rng.randrange(1, 30)]
            elif what == 2:
                damaged[at:at] = rng.choice([b'"', b"}", b"[", b"\\", b"\n", b"null", b"\xff", b":", b"1"])
            else:
                damaged[at:at] = damaged[at : at + rng.randrange(1, 200)]
            damaged = damaged or bytearray(b" ")
        try:
            run(bytes(damaged), name)
        except InputError as error:
            found += error.problems
    assert found
    assert all(p.where.startswith(name) and p.got and p.want for p in found)
