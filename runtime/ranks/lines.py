"""`Lines`: where ranks call the front end; `Line`: the connection to one of them, with its two threads."""

from __future__ import annotations

import queue
import secrets
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Final

import msgspec

from atomc.runtime.ranks.group import Stores
from atomc.runtime.ranks.wire import Done, Ready, ToFront, ToRank, decode_for_front, encode

_LOOK_SECONDS: Final = 0.1
# A caller that does not prove within this time that it holds the key is none of ours.
_GREETING_SECONDS: Final = 5


class Line:
    """The connection to one rank. `gone` is called once, with the reason, when it ends without `Done`."""

    def __init__(
        self,
        connection: Connection,
        ready: Ready,
        take: Callable[[int, ToFront], None],
        gone: Callable[[int, str], None],
    ) -> None:
        self.ready, self.ended = ready, threading.Event()
        self._connection, self._take, self._gone = connection, take, gone
        self._out: queue.SimpleQueue[ToRank | None] = queue.SimpleQueue()
        for work in (self._read, self._write):
            threading.Thread(target=work, name=f"atomc-rank-{ready.rank}", daemon=True).start()

    def send(self, message: ToRank) -> None:
        self._out.put(message)

    def close(self) -> None:
        self._out.put(None)

    def _read(self) -> None:
        try:
            while not isinstance(message := decode_for_front(self._connection.recv_bytes()), Done):
                self._take(self.ready.rank, message)
            self.ended.set()
            self._take(self.ready.rank, message)
        except (EOFError, OSError):
            self.ended.set()
            self._gone(self.ready.rank, "its process ended")
        except Exception as error:  # noqa: BLE001  whatever it is, nobody reads this line any more
            self._gone(self.ready.rank, f"its message cannot be taken ({type(error).__name__}: {error})")

    def _write(self) -> None:
        with suppress(OSError):  # the reader sees the same end, and says so
            while (message := self._out.get()) is not None:
                self._connection.send_bytes(encode(message))
        with suppress(OSError):
            self._connection.close()


class Lines:
    """Listens at a free port of `host`. `key`: what ranks of this run hold; None: one that is told in the store.

    Each caller is greeted in a thread of its own, so that one who says nothing holds up nobody.
    """

    def __init__(self, host: str, size: int, key: str | None = None) -> None:
        self.arrived: queue.SimpleQueue[tuple[Connection, Ready]] = queue.SimpleQueue()
        self._told = "-" if key else secrets.token_hex(32)
        self._key = (key or self._told).encode()
        self._socket = socket.create_server((host, 0), backlog=size)
        self._socket.settimeout(_LOOK_SECONDS)
        self._closed = threading.Event()

    def open(self, stores: Stores) -> None:
        """Tell ranks where to call, and listen until `close`; who has called is in `arrived`."""
        host, port = self._socket.getsockname()[:2]
        stores.main.set("front", f"{host} {port} {self._told}")
        threading.Thread(target=self._accept, name="atomc-accept", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def _accept(self) -> None:
        with self._socket:
            while not self._closed.is_set():
                with suppress(OSError):
                    caller = self._socket.accept()[0]
                    threading.Thread(target=self._greet, args=(caller,), name="atomc-greet", daemon=True).start()

    def _greet(self, caller: socket.socket) -> None:
        """Nothing comes of a caller that is no rank of this run, or died while it called: the watchdog sees that."""
        caller.setblocking(True)
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", _GREETING_SECONDS, 0))
        connection = Connection(caller.detach())
        with suppress(EOFError, OSError, AuthenticationError, msgspec.MsgspecError):
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            message = decode_for_front(connection.recv_bytes())
            if isinstance(message, Ready):
                with socket.socket(fileno=connection.fileno()) as same:
                    same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 0))
                    same.detach()
                self.arrived.put((connection, message))
                return
        connection.close()
