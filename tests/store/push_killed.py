"""Pushes one adapter into fresh stores URL/0, URL/1, ...; push n is killed with -9 before its n-th step to disk or net.

python tests/store/push_killed.py ADAPTER URL JOB      prints the number of kills, when one push got through unharmed
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from scripts.push import push
from scripts.store import open_store

STEPS = {"open", "os.mkdir", "os.rename", "os.link", "os.remove"}


def main(folder: str, url: str, job_id: str) -> None:
    open_store(url)  # imports what the children need, once
    number = 0
    while True:
        if os.fork() == 0:
            store = open_store(f"{url}/{number}")
            _arm(number)
            push(Path(folder), store, job_id)
            os._exit(0)
        status = os.wait()[1]
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            print(number)
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
        number += 1


def _arm(steps: int) -> None:
    """Dies in the instant before step `steps`. Python reports each step to audit hooks before it is done.

    A body goes out in pieces of 16 KiB: its first piece is a step, and so is the request's head before it.
    """
    left = steps
    head_was_sent = False

    def hook(event: str, arguments: Any) -> None:
        nonlocal left, head_was_sent
        is_head = event == "http.client.send" and b"HTTP/1.1" in bytes(arguments[1][:2000])
        if event in STEPS or is_head or (event == "http.client.send" and head_was_sent):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
        if event == "http.client.send":
            head_was_sent = is_head

    sys.addaudithook(hook)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3])
