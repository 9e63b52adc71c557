"""Where ranks call: who says nothing or the wrong thing holds up nobody; what a layout says of ranks; the store."""

from __future__ import annotations

import socket
import threading
from multiprocessing import AuthenticationError
from pathlib import Path

import pytest

from atomc.runtime.errors import RankError, ServingError
from atomc.runtime.options import Given, RunOptions
from atomc.runtime.ranks.beats import Bounds
from atomc.runtime.ranks.front import RankedFront
from atomc.runtime.ranks.group import Stores
from atomc.runtime.ranks.lines import Line, Lines
from atomc.runtime.ranks.mesh import mesh_of
from atomc.runtime.ranks.wire import Channel, Done, Ready, ToFront
from tests.support.fake_executor import FakeServing

HERE = "127.0.0.1"
READY = Ready(0, 1, "here", 100, 4, "all of it")


@pytest.fixture
def stores() -> Stores:
    return Stores.open(HERE, 0, "0", Bounds(), host_it=True)


def test_a_silent_caller_holds_up_nobody(stores: Stores) -> None:
    lines = Lines(HERE, 2)
    lines.open(stores)
    host, port, key = stores.main.get("front").decode().split()
    silent = [socket.create_connection((host, int(port))) for _ in range(3)]
    silent[1].sendall(b"GET / HTTP/1.1\r\n\r\n")
    channel = Channel.connect(host, int(port), key.encode())
    channel.send(READY)
    connection, ready = lines.arrived.get(timeout=3)
    assert ready == READY
    messages: list[ToFront] = []
    line = Line(connection, ready, lambda rank, message: messages.append(message), lambda rank, why: None)
    channel.send(Done())
    assert line.ended.wait(3)
    assert messages == [Done()]
    lines.close()
    for each in silent:
        each.close()


def test_a_caller_without_the_key_is_refused(stores: Stores) -> None:
    lines = Lines(HERE, 2, key="of this run")
    lines.open(stores)
    host, port, told = stores.main.get("front").decode().split()
    assert told == "-", "the key is in the store"
    with pytest.raises((OSError, EOFError, AuthenticationError)):
        Channel.connect(host, int(port), b"another").send(READY)
    assert lines.arrived.empty()
    lines.close()


def test_a_message_that_is_none_ends_the_line(stores: Stores) -> None:
    lines, gone = Lines(HERE, 1), threading.Event()
    reasons: list[str] = []
    lines.open(stores)
    host, port, key = stores.main.get("front").decode().split()
    channel = Channel.connect(host, int(port), key.encode())
    channel.send(READY)
    connection, ready = lines.arrived.get(timeout=3)

    def end(rank: int, why: str) -> None:
        reasons.append(why)
        gone.set()

    Line(connection, ready, lambda rank, message: None, end)
    channel._connection.send_bytes(b"?")
    assert gone.wait(3)
    assert "its message cannot be taken (ValidationError" in reasons[0] or "DecodeError" in reasons[0]
    lines.close()


def test_the_store_listens_at_its_address_alone(stores: Stores) -> None:
    socket.create_connection((HERE, stores.port)).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", stores.port))


def test_a_store_that_says_nothing_is_not_waited_for() -> None:
    with socket.create_server((HERE, 0)) as silent, pytest.raises(ServingError, match="no answer within 1 s"):
        Stores.open(HERE, silent.getsockname()[1], "0", Bounds(silent_ms=1000))


def test_a_request_of_its_own_error_is_no_lost_rank(stores: Stores, tokenizer_path: Path) -> None:
    front = RankedFront(FakeServing(), tokenizer_path, 2, stores, Bounds())
    assert front.problem == (500, "engine_error")
    front.error = RankError("Rank 1 was lost.", ranks=(1,), step=3)
    assert front.problem == (503, "rank_lost")


def test_meshes() -> None:
    assert mesh_of(None, 3) == (3, 1)
    assert mesh_of("tp=2, dp=4,moe=ep", 8) == (4, 2)
    with pytest.raises(ServingError, match="dp=2,tp=2 is for 4 ranks, and 3 are started"):
        mesh_of("dp=2,tp=2", 3)
    with pytest.raises(ServingError, match="tp=x is no number of ranks"):
        mesh_of("tp=x", 3)


def test_options_are_handed_on_as_they_are() -> None:
    options = RunOptions("dp=2,moe=ep", 4, 1 << 30, None, 7, silent_ms=900)
    given = Given.parse(["x.atom", "--role=rank", *options.arguments()], "test", "")
    assert (given.run, given.role, given.http.name) == (options, "rank", ())


def test_an_option_below_its_least_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        Given.parse(["x.atom", "--silent-ms=3"], "test", "")
    assert "--silent-ms 3: it must be at least 500" in capsys.readouterr().err
