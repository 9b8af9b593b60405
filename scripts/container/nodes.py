"""Which node of a job that runs on several this machine is, as its provider's environment says.

| variable | what it says | where it is missing |
|---|---|---|
| NODES | machines of the job | 1 |
| NODE_RANK | which of them this is, from 0 | an error where there are several |
| MASTER_ADDR | a name or address at which node 0 is reached by the others | an error where there are several |
| MASTER_PORT | node 0 listens on this port + the number of the attempt | 29500 |
| GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME | the network interface between the nodes | the one that leads to node 0 |

Whoever rents the machines sets them (docs/decisions/several-nodes.md).
"""

from __future__ import annotations

import fcntl
import re
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from scripts.errors import InputError, Problem

MOST_NODES = 16
FIRST_PORT = 29500
_SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class Node:
    """One machine of a job. As it stands without arguments: the only one."""

    count: int = 1
    rank: int = 0
    address: str = "127.0.0.1"
    port: int = FIRST_PORT

    @property
    def leads(self) -> bool:
        """Whether it keeps the job's records: node 0. The others follow it."""
        return self.rank == 0

    def words(self, attempt: int) -> list[str]:
        """What torchrun is told. Each attempt has a port of its own, and so meets nothing that an earlier one left."""
        port = self.port + attempt if self.count > 1 else free_port()
        return [
            *("--nnodes", str(self.count), "--node_rank", str(self.rank)),
            *("--master_addr", self.address, "--master_port", str(port)),
        ]


ALONE = Node()


def node_of(environment: Mapping[str, str]) -> Node:
    """This machine among the nodes of its job. Raises InputError."""
    count = _number(environment, "NODES", 1, 1, MOST_NODES)
    if count == 1:
        return ALONE
    address = environment.get("MASTER_ADDR", "")
    if not re.fullmatch(r"[A-Za-z0-9.:-]{1,253}", address):
        raise InputError(Problem("MASTER_ADDR", repr(address[:80]), "the name or address of node 0"))
    rank = _number(environment, "NODE_RANK", None, 0, count - 1)
    return Node(count, rank, address, _number(environment, "MASTER_PORT", FIRST_PORT, 1024, 65_000))


def network_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What Gloo and NCCL must be told of the network between the nodes; empty for one alone.

    Gloo takes the interface of this machine's own name otherwise, which often is 127.0.0.1: its ranks would tell each
    other an address at which nobody is reached.
    """
    node = node_of(environment)
    interface = _interface_to(node.address) if node.count > 1 else None
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if interface else ()
    return {name: environment.get(name) or str(interface) for name in names}


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _number(environment: Mapping[str, str], name: str, otherwise: int | None, least: int, most: int) -> int:
    text = environment.get(name) or ("" if otherwise is None else str(otherwise))
    if not text.isdecimal() or not least <= int(text) <= most:
        raise InputError(Problem(name, repr(text[:80]), f"a whole number from {least} to {most}"))
    return int(text)


def _interface_to(address: str) -> str | None:
    """The interface with the address from which this machine would write to that one; None where there is no way."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, FIRST_PORT))  # sends nothing
            mine = socket.inet_aton(probe.getsockname()[0])
            names = [name for _, name in socket.if_nameindex()]
            return next((name for name in names if _address_of(probe, name) == mine), None)
    except OSError:
        return None


def _address_of(probe: socket.socket, interface: str) -> bytes | None:
    try:
        answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
    except OSError:  # it has no address
        return None
    return answer[20:24]
