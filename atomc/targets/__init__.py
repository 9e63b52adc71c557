"""The targets that atomc compiles for, one module each. A new target is a new module and one line in `TARGETS`."""

from difflib import get_close_matches

from atomc.errors import AtomcError
from atomc.targets import b200, cpu, h100, h200, mi300x, mi355x
from atomc.targets.target import Format, Link, Peaks, Residency, Sustained, Target, TritonBackend

__all__ = [
    "TARGETS", "Format", "Link", "Peaks", "Residency", "Sustained", "Target", "TritonBackend", "UnknownTargetError",
    "get_target",
]  # fmt: skip

TARGETS: dict[str, Target] = {module.TARGET.name: module.TARGET for module in (cpu, mi355x, h100, h200, b200, mi300x)}


class UnknownTargetError(AtomcError):
    """A target name that no module of `atomc.targets` has."""

    def __init__(self, name: str) -> None:
        self.name = name
        by_arch = [target.name for target in TARGETS.values() if target.arch == name.lower()]
        close = by_arch or get_close_matches(name.lower(), TARGETS, n=1, cutoff=0.5)
        meant = f" Did you mean {' or '.join(close)}?" if close else ""
        super().__init__(f"unknown target {name!r}.{meant} Known targets: {', '.join(TARGETS)}.")

    def __reduce__(self) -> tuple[type["UnknownTargetError"], tuple[str]]:
        return type(self), (self.name,)


def get_target(name: str) -> Target:
    """The target called `name`, in lower case (`cpu`, `mi355x`, ...).

    Raises:
        UnknownTargetError: no target has that name; lists the known ones.
    """
    try:
        return TARGETS[name]
    except KeyError:
        raise UnknownTargetError(name) from None
