"""Options of a served run: read by `python -m atomc.runtime`, handed to ranks; `atomc serve` takes its words from here.

Nothing heavy is imported here: a command line is parsed before anything is loaded.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self


def _option(default: Any, help: str, least: float | None = None, kind: type = int) -> Any:
    return field(default=default, metadata={"help": help, "least": least, "kind": kind})


@dataclass(frozen=True)
class RunOptions:
    """Of all ranks alike; milliseconds, bytes and numbers. Sizes of caches are of each rank."""

    parallel: str | None = _option(None, "Layout of the artifact that the ranks run: dp=2,tp=2,moe=ep.", kind=str)
    max_requests: int | None = _option(None, "Requests that run together, on each rank.", 1)
    memory_bytes: int | None = _option(None, "Memory for the caches of each rank.", 1)
    num_blocks: int | None = _option(None, "Blocks of compressed rows, on each rank.", 2)
    num_window_pages: int | None = _option(None, "Pages of the sliding window, on each rank.", 2)
    join_ms: int = _option(120_000, "Milliseconds until all ranks have met.", 500)
    load_ms: int = _option(1_800_000, "Milliseconds that a rank may take to load.", 500)
    silent_ms: int = _option(4_000, "Milliseconds without a sign of life after which a rank is lost.", 500)
    first_ms: int = _option(60_000, "Milliseconds that a rank may stand still in its first step.", 500)
    late_ms: int = _option(6_000, "Milliseconds that a rank may stand still in any other step.", 500)

    def arguments(self) -> list[str]:
        """As a command line has them."""
        return [f"--{_dashed(name)}={value}" for name, value in asdict(self).items() if value is not None]


@dataclass(frozen=True)
class HttpOptions:
    """Of the front end."""

    host: str = _option("127.0.0.1", "Address to listen on; 0.0.0.0 is every one.", kind=str)
    port: int = _option(8000, "Port; 0 takes any that is free.", 0)
    name: tuple[str, ...] = _option((), "Name clients call the model by; may be repeated.", kind=str)
    max_waiting: int = _option(1024, "Requests that may wait; more are refused with 503.", 0)
    # Less than the 30 seconds that torchrun gives its processes after a signal.
    drain_seconds: float = _option(20.0, "How long running answers may take to end after SIGTERM or Ctrl-C.", 0, float)
    log_level: str = _option("info", "critical, error, warning, info, debug or trace.", kind=str)


@dataclass(frozen=True)
class Given:
    """What `python -m atomc.runtime` is asked for. `role`: of this process; ranks start the front end by themselves."""

    artifact: Path
    run: RunOptions
    http: HttpOptions
    role: str

    @classmethod
    def parse(cls, arguments: list[str], prog: str, text: str) -> Self:
        """Exits with code 2 on an option that is unknown or wrong."""
        parser = ArgumentParser(prog=prog, description=text)
        parser.add_argument("artifact", type=Path)
        for each in (*fields(RunOptions), *fields(HttpOptions)):
            _add(parser, each)
        parser.add_argument(
            "--role", choices=("all", "rank", "front"), default="all", help="which part this process is"
        )
        found = parser.parse_args(arguments)
        for each in (*fields(RunOptions), *fields(HttpOptions)):
            value, least = getattr(found, each.name), each.metadata["least"]
            if value is not None and least is not None and value < least:
                parser.error(f"--{_dashed(each.name)} {value}: it must be at least {least}")
        return cls(found.artifact, _of(RunOptions, found), _of(HttpOptions, found), found.role)


def help_of(name: str) -> dict[str, Any]:
    """An option's text and least value, by field."""
    found = _by_name()[name].metadata
    return {"help": found["help"], "min": found["least"]}


def _by_name() -> dict[str, Field[Any]]:
    return {each.name: each for each in (*fields(RunOptions), *fields(HttpOptions))}


def _add(parser: ArgumentParser, each: Field[Any]) -> None:
    assert each.default is not MISSING
    many: dict[str, Any] = {"action": "append"} if isinstance(each.default, tuple) else {}
    parser.add_argument(
        f"--{_dashed(each.name)}", type=each.metadata["kind"], help=each.metadata["help"],
        default=[] if many else each.default, **many,
    )  # fmt: skip


def _of(kind: type[Any], found: Namespace) -> Any:
    values = {each.name: getattr(found, each.name) for each in fields(kind)}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _dashed(name: str) -> str:
    return name.replace("_", "-")
