"""What the front end and the ranks say to one another: msgpack over a socket, never pickle.

Contract:
    A message is whole or not there. Both ends prove that they hold the run's key before the first one. `atomc serve`
    hands it to its ranks in their environment. Under torchrun it lies in the launcher's store, which whoever reaches
    that can read: run it in a trusted network only.
"""

from __future__ import annotations

from multiprocessing.connection import Client, Connection

import msgspec

from atomc.runtime.request import Output, SamplingParams


class Add(msgspec.Struct, tag=True, array_like=True):
    """A request for this rank, prepared and checked by the front end."""

    id: str
    tokens: list[int]
    params: SamplingParams
    limit: int
    stop_ids: list[int]


class Abort(msgspec.Struct, tag=True, array_like=True):
    """A client has left."""

    id: str


class Wake(msgspec.Struct, tag=True, array_like=True):
    """Another rank has got work: an idle rank need not wait out its pause."""


class Stop(msgspec.Struct, tag=True, array_like=True):
    """End every request with this error, and then, with all other ranks, the loop."""

    message: str


class Ready(msgspec.Struct, tag=True, array_like=True):
    """The first message of a rank. `machine` names the machine that `pid` means something on."""

    rank: int
    pid: int
    machine: str
    token_capacity: int
    max_requests: int
    capacity: str


class Outputs(msgspec.Struct, tag=True, array_like=True):
    """What a step added to the requests of a rank, and how many it holds now."""

    step: int
    outputs: list[Output]
    running: int
    waiting: int


class Leave(msgspec.Struct, tag=True, array_like=True):
    """The rank was asked to end by a signal: the whole run shall end in good order."""


class Done(msgspec.Struct, tag=True, array_like=True):
    """The last message of a rank that ends in good order."""


ToRank = Add | Abort | Wake | Stop
ToFront = Ready | Outputs | Leave | Done

_encoder = msgspec.msgpack.Encoder()
_to_rank = msgspec.msgpack.Decoder(ToRank)
_to_front = msgspec.msgpack.Decoder(ToFront)


def encode(message: ToRank | ToFront) -> bytes:
    """The message in msgpack."""
    return _encoder.encode(message)


def decode_for_rank(data: bytes) -> ToRank:
    """Raises `msgspec.DecodeError` on anything else."""
    message: ToRank = _to_rank.decode(data)
    return message


def decode_for_front(data: bytes) -> ToFront:
    """Raises `msgspec.DecodeError` on anything else."""
    message: ToFront = _to_front.decode(data)
    return message


class Channel:
    """A rank's end of its line to the front end."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @classmethod
    def connect(cls, host: str, port: int, key: bytes) -> Channel:
        """Raises `OSError` or `EOFError` when nobody with this key listens there."""
        return cls(Client((host, port), authkey=key))

    def send(self, message: ToFront) -> None:
        """Raises `OSError` when the front end is gone."""
        self._connection.send_bytes(encode(message))

    def receive(self, wait_seconds: float = 0.0) -> ToRank | None:
        """The next message, or None after the wait. Raises `EOFError` or `OSError` when the front end is gone."""
        if not self._connection.poll(wait_seconds):
            return None
        return decode_for_rank(self._connection.recv_bytes())
