"""`atomc serve`: an artifact behind OpenAI's HTTP interface."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from atomc.cli.engine import MemoryOption, open_engine
from atomc.cli.inspect import ArtifactArgument

if TYPE_CHECKING:
    import socket


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
) -> None:
    """Serve an artifact over HTTP. SIGTERM and Ctrl-C stop it when running answers have ended."""
    import asyncio

    from atomc.cli.failure import TERMINATED, OptionError

    if log_level not in (levels := ("critical", "error", "warning", "info", "debug", "trace")):
        raise OptionError(f"--log-level {log_level} is none of {', '.join(levels)}.")
    with _listen(host, port) as listener:
        executor, capacity = open_engine(
            artifact, max_requests=max_requests, memory=memory, num_blocks=num_blocks, num_window_pages=num_window_pages
        )
        from atomc.runtime.async_engine import AsyncEngine
        from atomc.runtime.engine import Engine
        from atomc.runtime.server.run import make_server

        names = tuple(name or ())
        engine = AsyncEngine(Engine(executor), max_waiting=max_waiting)
        server = make_server(engine, names=names, drain_seconds=drain_seconds, log_level=log_level)
        typer.echo(f"{' '.join(names) or executor.serving.model_name} from {artifact}, target cpu")
        typer.echo(f"  context {capacity.context:,} tokens; {capacity}")
        typer.echo(f"  {_url(listener)}/v1/completions  /v1/chat/completions  /v1/models  /health  /metrics")
        sys.stdout.flush()
        try:
            asyncio.run(server.serve(sockets=[listener]))
        except KeyboardInterrupt:  # uvicorn sends the signal on after a shutdown in good order
            pass
        except SystemExit as ended:
            if ended.code != TERMINATED:
                raise
    typer.echo("stopped.")


def _listen(host: str, port: int) -> socket.socket:
    """A socket bound before the artifact is loaded: what is wrong with the address is said at once."""
    import socket

    from atomc.cli.failure import OptionError

    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise OptionError(
            f"cannot listen on {host} port {port}: {_reason(error)}. Choose another --host or --port."
        ) from error


def _reason(error: OSError) -> str:
    """Without the address that Python adds; getaddrinfo has numbers of its own."""
    import os
    import socket

    found = error.strerror if isinstance(error, socket.gaierror) or error.errno is None else os.strerror(error.errno)
    return found or str(error)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
