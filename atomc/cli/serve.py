"""`atomc serve`: an artifact behind OpenAI's HTTP interface."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atomc.cli.engine import MemoryOption, open_engine
from atomc.cli.inspect import ArtifactArgument

if TYPE_CHECKING:
    import socket

    from atomc.runtime.protocols import Serving


def serve_command(
    artifact: ArtifactArgument,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes any that is free.")] = 8000,
    name: Annotated[
        list[str] | None, typer.Option(help="Name clients call the model by; may be repeated.", show_default="its own")
    ] = None,
    max_requests: Annotated[
        int | None, typer.Option(help="Requests that run together.", show_default="what it is compiled for")
    ] = None,
    memory: MemoryOption = None,
    num_blocks: Annotated[
        int | None, typer.Option(min=2, help="Blocks of compressed rows.", show_default="from --memory")
    ] = None,
    num_window_pages: Annotated[
        int | None, typer.Option(min=2, help="Pages of the sliding window.", show_default="from --max-requests")
    ] = None,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are refused with 503.")] = 1024,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="How long running answers may take to end after SIGTERM or Ctrl-C.")
    ] = 30.0,
    log_level: Annotated[str, typer.Option(help="critical, error, warning, info, debug or trace.")] = "info",
    nproc: Annotated[
        int, typer.Option(min=1, help="Data-parallel ranks on this machine, each a process with the whole model.")
    ] = 1,
    silent_ms: Annotated[
        int, typer.Option(min=500, help="Milliseconds without a sign of life after which a rank is lost.")
    ] = 4000,
    late_ms: Annotated[
        int, typer.Option(min=500, help="Milliseconds that a rank may stand still in a step before it is lost.")
    ] = 30_000,
    hold_ms: Annotated[
        int, typer.Option(min=0, help="Longest wait of a prompt for prompts of other ranks; 0 never waits.")
    ] = 0,
) -> None:
    """Serve an artifact over HTTP. SIGTERM and Ctrl-C stop it when running answers have ended."""
    from atomc.cli.failure import OptionError

    if log_level not in (levels := ("critical", "error", "warning", "info", "debug", "trace")):
        raise OptionError(f"--log-level {log_level} is none of {', '.join(levels)}.")
    from atomc.runtime.server.run import listen

    caches: dict[str, Any] = {
        "max_requests": max_requests, "memory": memory, "num_blocks": num_blocks, "num_window_pages": num_window_pages,
    }  # fmt: skip
    http: dict[str, Any] = {"names": tuple(name or ()), "drain_seconds": drain_seconds, "log_level": log_level}
    with listen(host, port) as listener, _until_stopped():
        if nproc == 1:
            _serve_alone(artifact, listener, max_waiting, caches, http)
        else:
            bounds = {"silent_ms": silent_ms, "late_ms": late_ms, "hold_ms": hold_ms}
            _serve_ranks(artifact, listener, nproc, max_waiting, caches, bounds, http)
    typer.echo("stopped.")


@contextmanager
def _until_stopped() -> Iterator[None]:
    """A signal that uvicorn sends on after a shutdown in good order is no error."""
    from atomc.cli.failure import TERMINATED

    try:
        yield
    except KeyboardInterrupt:
        pass
    except SystemExit as ended:
        if ended.code != TERMINATED:
            raise


def _serve_alone(
    artifact: Path, listener: socket.socket, max_waiting: int, caches: dict[str, Any], http: dict[str, Any]
) -> None:
    import asyncio

    executor, capacity = open_engine(artifact, **caches)
    from atomc.runtime.async_engine import AsyncEngine
    from atomc.runtime.engine import Engine
    from atomc.runtime.server.run import make_server

    engine = AsyncEngine(Engine(executor), max_waiting=max_waiting)
    server = make_server(engine, **http)
    sizes = f"context {capacity.context:,} tokens; {capacity}"
    _greet(artifact, executor.serving, [sizes], listener, http["names"])
    asyncio.run(server.serve(sockets=[listener]))


def _serve_ranks(
    artifact: Path,
    listener: socket.socket,
    nproc: int,
    max_waiting: int,
    caches: dict[str, Any],
    bounds: dict[str, int],
    http: dict[str, Any],
) -> None:
    """The front end is this process, the ranks are children of it."""
    from atomc.cli.units import parse_bytes
    from atomc.runtime.ranks.group import Stores
    from atomc.runtime.ranks.processes import Processes
    from atomc.runtime.ranks.serve import RankedServer
    from atomc.runtime.ranks.watchdog import Bounds

    watched = Bounds(silent_ms=bounds["silent_ms"], late_ms=bounds["late_ms"])
    given = {"memory_bytes": parse_bytes(caches.pop("memory"), "--memory"), **caches, **bounds}
    options = [f"--{key.replace('_', '-')}={value}" for key, value in given.items() if value is not None]
    stores = Stores.open("127.0.0.1", 0, "0", watched, host_it=True)
    server = RankedServer(artifact, nproc, "127.0.0.1", stores, watched, max_waiting=max_waiting)
    arguments = [str(artifact), "--role=rank", *options]
    processes = Processes(arguments, nproc, "127.0.0.1", stores.port, server.lost)
    try:
        server.gather()
        sizes = [f"rank {line.ready.rank}: {line.ready.capacity}" for line in server.front.lines]
        _greet(artifact, server.front.serving, sizes, listener, http["names"])
        server.serve(listener, **http)
    finally:
        processes.end(watched.grace_ms / 1000 + 1)


def _greet(
    artifact: Path, serving: Serving, capacities: list[str], listener: socket.socket, names: tuple[str, ...]
) -> None:
    typer.echo(f"{' '.join(names) or serving.model_name} from {artifact}, target cpu")
    for capacity in capacities:
        typer.echo(f"  {capacity}")
    typer.echo(f"  {_url(listener)}/v1/completions  /v1/chat/completions  /v1/models  /health  /metrics")
    sys.stdout.flush()


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
