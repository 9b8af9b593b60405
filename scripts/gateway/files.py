"""Uploaded training sets (/v1/files), and the adapter files of a store on disk, for whoever holds a signed link.

OpenAI(base_url="https://front-door/v1", api_key=KEY).files.create(file=open("set.jsonl", "rb"), purpose="fine-tune")
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from scripts.errors import InputError, NotFound, Problem
from scripts.gateway.auth import authenticated
from scripts.gateway.door import Door, Room
from scripts.gateway.http import Call, Endpoint, TooLarge, endpoint, guarded
from scripts.gateway.links import is_signed
from scripts.gateway.openai import page, required_file_id
from scripts.gateway.views import Json
from scripts.store import FileStore
from scripts.store.base import CHUNK_BYTES, shown

_FORM_BYTES = 64 * 1024  # what a multipart body may have beside the file


def routes(door: Door) -> list[Route]:
    """Uploads, and downloads by signed link."""
    return [
        Route("/v1/files", _upload(door), methods=["POST"]),
        Route("/v1/files", endpoint(door, _list), methods=["GET"]),
        Route("/v1/files/{id}", endpoint(door, _retrieve), methods=["GET"]),
        Route("/files/{client}/{key:path}", _download(door), methods=["GET"]),
    ]


def _upload(door: Door) -> Endpoint:
    async def answer(request: Request) -> Response:
        client = authenticated(request.headers, door.clients)
        most = door.fetcher.max_bytes
        length = request.headers.get("content-length", "")
        if not length.isdigit() or int(length) > most + _FORM_BYTES:
            raise TooLarge(Problem("body", "too large, or of unknown length", f"at most {most} bytes"))
        try:
            async with request.form(max_files=1, max_fields=10) as form:
                upload, purpose = form.get("file"), form.get("purpose")
                if not isinstance(upload, UploadFile):
                    raise InputError(Problem("file", "missing", "multipart/form-data with a file"))
                if purpose != "fine-tune":
                    raise InputError(Problem("purpose", ascii(str(purpose)[:40]), "fine-tune"))
                return JSONResponse(await run_in_threadpool(_stored, door, door.room(client), upload))
        except (MultiPartException, HTTPException, UnicodeError):
            raise InputError(Problem("body", "not a form", "multipart/form-data with file and purpose")) from None

    return guarded(answer)


def _stored(door: Door, room: Room, upload: UploadFile) -> Json:
    """The file under an id made of its bytes: uploaded twice, it is there once."""
    digest, size = hashlib.sha256(), 0
    with tempfile.TemporaryDirectory(prefix="lorry-upload-") as folder:
        path = Path(folder) / "content"
        with path.open("wb") as file:
            while chunk := upload.file.read(CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
                file.write(chunk)
        if not size:
            raise InputError(Problem("file", "an empty file", "a training set"))
        file_id = f"file-{digest.hexdigest()[:32]}"
        room.files.put_file(path, f"{file_id}/content")
    name = "".join(c for c in (upload.filename or "training-set") if c.isprintable())[:120]
    about = {"id": file_id, "bytes": size, "filename": name, "created_at": int(door.now())}
    room.files.create(f"{file_id}/file.json", json.dumps(about).encode())
    return _about(room, file_id)


def _list(door: Door, call: Call) -> Json:
    room = door.room(call.client)
    ids = [key.split("/")[0] for key in room.files.keys("") if key.endswith("/file.json")]
    return page(sorted((_about(room, i) for i in ids), key=lambda file: -int(file["created_at"])), call, default=100)


def _retrieve(door: Door, call: Call) -> Json:
    return _about(door.room(call.client), required_file_id(call.path["id"]))


def _about(room: Room, file_id: str) -> Json:
    data = room.files.read(f"{file_id}/file.json")
    if data is None:
        raise NotFound(Problem(f"file {file_id}", "no such file", "upload it to /v1/files"))
    about: Json = json.loads(data)
    return {"object": "file", "purpose": "fine-tune", "status": "processed"} | about


def _download(door: Door) -> Endpoint:
    async def answer(request: Request) -> Response:
        name, key = request.path_params["client"], request.path_params["key"]
        given = request.query_params
        client, secret = door.clients.get(name), door.settings.token_secret
        if client is None or not shown(key):
            raise _no_file()
        if not is_signed(name, key, given.get("expires", ""), given.get("signature", ""), secret, door.now()):
            raise _no_file()
        store = door.room(client).jobs
        path = store.root / key if isinstance(store, FileStore) else None
        if path is None or not path.is_file():
            raise _no_file()
        return FileResponse(path, filename=path.name, media_type="application/octet-stream")

    return guarded(answer)


def _no_file() -> NotFound:
    return NotFound(Problem("link", "it does not lead to a file, or has expired", "ask for the job's status again"))
