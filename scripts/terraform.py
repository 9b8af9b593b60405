"""Runs Terraform for a root under infra/live and tells what went wrong in one sentence per cause.

    Terraform(Path("infra/live/dev/runpod"), dict(os.environ), {"datacenter": "US-KS-2"}).plan()

python-terraform builds the command line and the variable files; running, reading and failing are done here, because its
own apply, destroy and output were written for a Terraform of 2019.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from python_terraform import IsFlagged
from python_terraform import Terraform as CommandLine

from scripts.errors import NotFound, Problem, ProviderError

Event = dict[str, Any]
OnEvent = Callable[[Event], None]
PLAN_FILE = "room.tfplan"
_CHANGES = 2  # exit status of plan -detailed-exitcode

_AGAIN = "run the same command again"
_KEPT = "what was made is kept"
# Text in a diagnostic -> what to do about it. The first match wins, so the particular stands before the general.
_NEXT_STEPS = [
    (r"Error acquiring the state lock", "wait for that command to end; if it died, run `terraform force-unlock ID`"),
    (r"undeclared variable", "remove it or correct its spelling"),
    (r"Missing API key", f"set RUNPOD_API_KEY to a key with read and write access, then {_AGAIN}"),
    (
        r"No valid credential sources|InvalidClientTokenId|ExpiredToken",
        f"sign in to AWS, then {_AGAIN}",
    ),
    (r"BucketAlreadyExists|BucketAlreadyOwnedByYou", "bucket names are shared by all accounts: choose another name"),
    (r"no instances currently available", "choose another datacentre or GPU: see `lorry capacity`"),
    (r"no available releases|Failed to query available provider", "check the network or the provider mirror"),
    (r"Backend initialization required|Inconsistent dependency lock|[Mm]odule not installed", "run init first"),
    (
        r"\(401\)|\(403\)|AccessDenied|not authorized",
        "the key is refused: check that it is live and has the permission",
    ),
    (r"\(402\)", f"add credit to the Runpod account; {_KEPT}"),
    (r"\(429\)|Throttling|TooManyRequests", f"wait a minute and {_AGAIN}; {_KEPT}"),
    (r"\((409|5\d\d)\)|Request failed|RequestError", f"{_AGAIN} later; {_KEPT}"),
    (r"\((400|422)\)", f"correct the value it names, then {_AGAIN}; {_KEPT}"),
]


class TerraformError(ProviderError):
    """Terraform refused or failed. `diagnostics` are its own, as its JSON events give them."""

    code = "terraform"

    def __init__(self, command: str, rc: int, diagnostics: list[Event]) -> None:
        self.command = command
        self.rc = rc
        self.diagnostics = diagnostics
        super().__init__(*dict.fromkeys(_problem(command, d) for d in diagnostics))


@dataclass(frozen=True)
class Terraform:
    """One root. `env` is the complete environment of the command; `variables` must all be declared in the root."""

    root: Path
    env: Mapping[str, str]
    variables: Mapping[str, Any] | None = None

    def init(self, on_event: OnEvent | None = None, **options: Any) -> None:
        """Options as python-terraform takes them: backend_config={...}, lockfile="readonly". Raises TerraformError."""
        self._run("init", {"input": False, **options}, on_event)

    def validate(self) -> None:
        """Check the root without any cloud. Raises TerraformError."""
        answer = self._document(["validate"], accept=(0, 1))
        if not answer["valid"]:
            raise TerraformError("validate", 1, [d for d in answer["diagnostics"] if d["severity"] == "error"])

    def plan(self, on_event: OnEvent | None = None) -> bool:
        """Write the plan file; True when it holds changes. Raises TerraformError."""
        options = {"input": False, "out": PLAN_FILE, "detailed_exitcode": IsFlagged, **self._variables()}
        return self._run("plan", options, on_event, accept=(0, _CHANGES)) == _CHANGES

    def apply(self, on_event: OnEvent | None = None) -> None:
        """Carry out the plan file, and nothing that was not planned. Raises TerraformError; the state is kept."""
        self._run("apply", {"input": False}, on_event, arguments=[PLAN_FILE])

    def destroy(self, on_event: OnEvent | None = None) -> None:
        """Remove everything the root made. Raises TerraformError; the state is kept."""
        self._run("destroy", {"input": False, "auto_approve": IsFlagged, **self._variables()}, on_event)

    def output(self) -> dict[str, Any]:
        """All outputs of the root, name -> value. Raises TerraformError."""
        return {name: field["value"] for name, field in self._document(["output"]).items()}

    def show(self, plan: bool = False) -> dict[str, Any]:
        """The state, or the plan file, as Terraform's JSON document. Raises TerraformError."""
        return self._document(["show", PLAN_FILE] if plan else ["show"])

    def _variables(self) -> dict[str, Any]:
        return {"var": dict(self.variables)} if self.variables else {}

    def _run(
        self,
        command: str,
        options: dict[str, Any],
        on_event: OnEvent | None,
        accept: tuple[int, ...] = (0,),
        arguments: list[str] | None = None,
    ) -> int:
        builder = CommandLine(working_dir=str(self.root))
        argv = builder.generate_cmd_string(command, *(arguments or []), json=IsFlagged, **options)
        errors: list[Event] = []
        tail: list[str] = []

        def read(line: str) -> None:
            event = _event(line)
            if event["type"] == "text":
                tail.append(line.strip())
            elif event["type"] == "diagnostic" and _is_error(event["diagnostic"]):
                errors.append(event["diagnostic"])
            if on_event:
                on_event(event)

        try:
            rc = self._stream(command, argv, read)
        finally:
            builder.temp_var_files.clean_up()
        if rc not in accept or errors:
            spoken = [{"summary": line} for line in tail if line][-3:] or [{"summary": "it said nothing"}]
            raise TerraformError(command, rc, errors or spoken)
        return rc

    def _stream(self, command: str, argv: list[str], read: Callable[[str], None]) -> int:
        """Run to the end, one call of `read` per line.

        Ctrl-C is passed on once. However often it comes, and whatever `read` raises, Terraform's output stays open
        until it has ended: a Terraform that can no longer write dies before it has saved its state.
        """
        try:
            process = subprocess.Popen(
                argv,
                cwd=self.root,
                env=dict(self.env),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        except FileNotFoundError:
            raise _missing(command, self.root) from None
        with process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    read(line)
            except BaseException:
                _end(process, process.stdout, read)
                raise
        return process.returncode

    def _document(self, words: list[str], accept: tuple[int, ...] = (0,)) -> dict[str, Any]:
        argv = ["terraform", words[0], "-json", "-no-color", *words[1:]]
        try:
            done = subprocess.run(
                argv, cwd=self.root, env=dict(self.env), stdin=subprocess.DEVNULL, capture_output=True, text=True
            )
        except FileNotFoundError:
            raise _missing(words[0], self.root) from None
        if done.returncode not in accept:
            raise TerraformError(words[0], done.returncode, [{"summary": _plain(done.stderr) or "it said nothing"}])
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer


def _end(process: subprocess.Popen[str], output: Iterable[str], read: Callable[[str], None]) -> None:
    """Asks Terraform to stop, and waits until it has saved what it made. Nobody's impatience shortens that."""
    process.send_signal(signal.SIGINT)
    while process.poll() is None:
        try:
            for line in output:
                with suppress(Exception):  # whoever listened may be gone, or fail at every line
                    read(line)
            process.wait()
        except KeyboardInterrupt:
            continue


def read_outputs(root: Path, env: Mapping[str, str]) -> dict[str, Any]:
    """What an applied root says about itself: the fields of its output `room`, as infra/README.md lists them.

    Raises NotFound when nothing was applied, TerraformError when the state cannot be read.
    """
    room = Terraform(root, env).output().get("room")
    if room is None:
        raise NotFound(Problem(str(root), "nothing has been applied here", "run init, plan and apply first"))
    return dict(room)


def _event(line: str) -> Event:
    try:
        event = json.loads(line)
    except ValueError:
        return {"type": "text", "@message": line.rstrip()}
    return event if isinstance(event, dict) and "type" in event else {"type": "text", "@message": line.rstrip()}


def _is_error(diagnostic: Event) -> bool:
    """Terraform only warns of a variable that no root declares; a misspelt name must not pass."""
    return diagnostic["severity"] == "error" or "undeclared variable" in diagnostic["summary"]


def _problem(command: str, diagnostic: Event) -> Problem:
    detail = diagnostic.get("detail", "").split("\n\nThis was checked by")[0]
    summary = diagnostic["summary"]
    # A rule of our own (validation, precondition, check) already is the whole sentence.
    ours = summary.startswith(("Invalid value for variable", "Resource precondition failed"))
    said = _plain(detail if ours else f"{summary}: {detail}" if detail else summary)
    step = next((step for pattern, step in _NEXT_STEPS if re.search(pattern, said)), "")
    where = f"terraform {command}: {diagnostic['address']}" if diagnostic.get("address") else f"terraform {command}"
    return Problem(where, said, "" if ours else step)


def _plain(text: str) -> str:
    """One line without Terraform's box drawing."""
    return re.sub(r"\s+", " ", re.sub(r"\x1b\[[0-9;]*m|[^\x00-\x7f]", "", text)).strip()


def _missing(command: str, root: Path) -> TerraformError:
    return TerraformError(
        command, 127, [{"summary": f"no `terraform` on the PATH, or no folder {root}; install Terraform 1.11 or later"}]
    )
