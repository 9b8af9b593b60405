"""Checks of the models folder: the files of a model against its manifest, and room for what is to come."""

from __future__ import annotations

from collections.abc import Iterator

from scripts.doctor.finding import Finding, Subject, failed, not_checked, ok
from scripts.errors import Problem, ProviderError
from scripts.model_manifest import ModelManifest, folder_name, read_manifest, staged_model
from scripts.models import model_problem
from scripts.stage import SPARE_BYTES, free_bytes
from scripts.store import FileStore, Store, open_store

_GB = 10**9


def check_model(subject: Subject) -> Iterator[Finding]:
    """Every file of the manifest is there with its length; `lorry stage --verify` also reads the bytes."""
    if subject.model is None:
        yield not_checked("model", "none was named", "name the base model with --model")
        return
    staged_model(subject.model)
    store = open_store(subject.models)
    manifest = read_manifest(store, subject.model)
    where = f"{store.url}/{folder_name(subject.model)}"
    if manifest is None:
        yield failed("model", f"{where} has no manifest", f"run `lorry stage {subject.model} --to {store.url}`")
        return
    odd = _odd_files(store, manifest)
    again = f"run `lorry stage {subject.model} --to {store.url} --from DIR`: what is sound is kept"
    if odd:
        yield failed("model", f"{len(odd)} of {len(manifest.files)} files are not whole, first {where}/{odd[0]}", again)
    elif isinstance(store, FileStore) and (problem := model_problem(store.root / folder_name(subject.model))):
        yield failed("model", problem, again)
    else:
        size = f"{len(manifest.files)} files, {manifest.total_bytes / _GB:.1f} GB"
        yield ok("model", f"{where}: {size}, revision {manifest.revision or 'unknown'}")


def check_room_for_models(subject: Subject) -> Iterator[Finding]:
    """Room for the model where it is not staged yet, and for what else writes there."""
    name = "room for models"
    store = open_store(subject.models)
    free = free_bytes(store, folder_name(subject.model or ""), subject.runpod)
    if free is None:
        yield not_checked(name, f"nothing limits {store.url}, or it is a volume and RUNPOD_API_KEY is not set")
        return
    needed = SPARE_BYTES
    staged = read_manifest(store, subject.model) if subject.model else None
    if staged is not None and not isinstance(store, FileStore):
        needed += staged.total_bytes  # free_bytes leaves out the manifest of this very model
    elif staged is None and subject.model is not None:
        needed += round(staged_model(subject.model).checkpoint_gb * _GB)
    if needed > free:
        seen = f"{free / _GB:.1f} GB are free at {store.url}, {needed / _GB:.1f} GB are needed"
        yield failed(name, seen, "make the disk or volume larger, or remove what is not needed")
    else:
        yield ok(name, f"{free / _GB:.1f} GB are free at {store.url}, {needed / _GB:.1f} GB are needed")


def _odd_files(store: Store, manifest: ModelManifest) -> list[str]:
    """Names of files that are missing or of another length."""
    found = _lengths(store, manifest)
    return sorted(name for name, file in manifest.files.items() if found.get(name) != file.bytes)


def _lengths(store: Store, manifest: ModelManifest) -> dict[str, int]:
    """Name -> bytes of the files that are there. A bucket is asked for each: its list may be stale."""
    folder = folder_name(manifest.model)
    if isinstance(store, FileStore):
        paths = {name: store.root / folder / name for name in manifest.files}
        return {name: path.stat().st_size for name, path in paths.items() if path.is_file()}
    import boto3
    from botocore.exceptions import ClientError

    bucket, _, prefix = store.url.removeprefix("s3://").partition("/")
    client = boto3.client("s3")
    found = {}
    for name in manifest.files:
        try:
            key = "/".join(part for part in (prefix, folder, name) if part)
            found[name] = int(client.head_object(Bucket=bucket, Key=key)["ContentLength"])
        except ClientError as error:
            code = str(error.response["Error"].get("Code"))
            if code not in ("404", "NoSuchKey", "NotFound"):
                raise ProviderError(Problem(f"{store.url}/{folder}/{name}", code, "check the key's rights")) from None
    return found
