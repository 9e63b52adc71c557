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
from atomc.runtime.options import HttpOptions, RunOptions, help_of

if TYPE_CHECKING:
    import socket

    from atomc.runtime.protocols import Serving


def _option(name: str, **more: Any) -> Any:
    return typer.Option(**help_of(name), **more)


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
    max_waiting: Annotated[int, _option("max_waiting")] = HttpOptions.max_waiting,
    drain_seconds: Annotated[float, _option("drain_seconds")] = 30.0,
    log_level: Annotated[str, _option("log_level")] = HttpOptions.log_level,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks on this machine, each a process.", show_default="of --parallel, or 1"),
    ] = None,
    parallel: Annotated[str | None, _option("parallel", show_default="the whole model on each rank")] = None,
    load_ms: Annotated[int, _option("load_ms")] = RunOptions.load_ms,
    silent_ms: Annotated[int, _option("silent_ms")] = RunOptions.silent_ms,
    first_ms: Annotated[int, _option("first_ms")] = RunOptions.first_ms,
    late_ms: Annotated[int, _option("late_ms")] = RunOptions.late_ms,
) -> None:
    """Serve an artifact over HTTP. SIGTERM and Ctrl-C stop it when running answers have ended."""
    from atomc.cli.failure import OptionError
    from atomc.cli.units import parse_bytes

    if log_level not in (levels := ("critical", "error", "warning", "info", "debug", "trace")):
        raise OptionError(f"--log-level {log_level} is none of {', '.join(levels)}.")
    from atomc.runtime.server.run import listen

    http: dict[str, Any] = {"names": tuple(name or ()), "drain_seconds": drain_seconds, "log_level": log_level}
    with listen(host, port) as listener, _until_stopped():
        if parallel is None and nproc in (None, 1):
            caches = {
                "max_requests": max_requests, "memory": memory, "num_blocks": num_blocks,
                "num_window_pages": num_window_pages,
            }  # fmt: skip
            _serve_alone(artifact, listener, max_waiting, caches, http)
        else:
            options = RunOptions(
                parallel, max_requests, parse_bytes(memory, "--memory"), num_blocks, num_window_pages,
                load_ms=load_ms, silent_ms=silent_ms, first_ms=first_ms, late_ms=late_ms,
            )  # fmt: skip
            _serve_ranks(artifact, listener, nproc, max_waiting, options, http)
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
    nproc: int | None,
    max_waiting: int,
    options: RunOptions,
    http: dict[str, Any],
) -> None:
    """The front end is this process, the ranks are children of it."""
    import secrets

    from atomc.runtime.ranks.group import Stores
    from atomc.runtime.ranks.layout import layout_of
    from atomc.runtime.ranks.processes import Processes
    from atomc.runtime.ranks.serve import RankedServer, bounds_of

    layout = layout_of(options.parallel)
    size = nproc or (1 if layout is None else layout.ranks)
    bounds, key, here = bounds_of(options), secrets.token_hex(32), "127.0.0.1"
    stores = Stores.open(here, 0, "0", bounds, host_it=True)
    server = RankedServer(artifact, size, here, stores, options, key=key, max_waiting=max_waiting)
    processes = Processes([str(artifact), "--role=rank", *options.arguments()], size, here, stores.port, key)
    try:
        processes.start(server.lost, bounds.silent_ms)
        server.gather()
        sizes = [f"rank {line.ready.rank}: {line.ready.capacity}" for line in server.front.lines]
        _greet(artifact, server.front.serving, sizes, listener, http["names"])
        server.serve(listener, **http)
    finally:
        processes.end(bounds.grace_ms / 1000 + 1)


def _greet(
    artifact: Path, serving: Serving, capacities: list[str], listener: socket.socket, names: tuple[str, ...]
) -> None:
    from atomc.artifact.store import read_manifest

    target = read_manifest(artifact).target
    typer.echo(f"{' '.join(names) or serving.model_name} from {artifact}, target {target}")
    for capacity in capacities:
        typer.echo(f"  {capacity}")
    typer.echo(f"  {_url(listener)}/v1/completions  /v1/chat/completions  /v1/models  /health  /metrics")
    sys.stdout.flush()


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
