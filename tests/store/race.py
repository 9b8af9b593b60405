"""Many processes create one key at the same moment; prints the numbers of those who were told that they won.

python tests/store/race.py URL KEY PROCESSES
"""

from __future__ import annotations

import os
import sys

from scripts.store import open_store


def main(url: str, key: str, processes: int) -> None:
    open_store(url)  # imports what the children need, once
    gate, opener = os.pipe()
    for number in range(processes):
        if os.fork() == 0:
            os.close(opener)
            store = open_store(url)
            os.read(gate, 1)  # returns for all at once, when the parent closes its end
            if store.create(key, f"writer {number}".encode()):
                print(number, flush=True)
            os._exit(0)
    os.close(opener)
    for _ in range(processes):
        assert os.wait()[1] == 0


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
