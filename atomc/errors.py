"""The catalogue of errors atomc raises for its user: each says what was found, where, and what to do.

A subclass adds its own facts as attributes and its message as a template; the command line prints `str(error)` and
exits with `exit_code`. Anything that is not an `AtomcError` is a defect of atomc itself.
"""

from collections.abc import Sequence
from typing import ClassVar


class AtomcError(Exception):
    """Root of all errors meant for the user.

    `exit_code` is what the command line exits with (1 = general, 2 is left to usage errors of the command line itself).
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ProblemsError(AtomcError):
    """Several problems found in one place, reported together so that one run shows all there is to mend.

    `where` is the file or folder; `problems` holds every problem, the message the first `shown` and a count.
    """

    shown: ClassVar[int] = 20
    headline: ClassVar[str] = "{where}: {count} problem{s}"

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.where = where
        self.problems = tuple(problems)
        count = len(self.problems)
        lines = [self.headline.format(where=where, count=count, s="" if count == 1 else "s")]
        lines += [f"  - {problem}" for problem in self.problems[: self.shown]]
        if count > self.shown:
            lines.append(f"  … and {count - self.shown} more")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type["ProblemsError"], tuple[str, tuple[str, ...]]]:
        return type(self), (self.where, self.problems)


class ConfigError(ProblemsError):
    """A model configuration is illegal; each problem names the key, the value, why, and the legal range."""

    exit_code = 3
    headline = "{where}: {count} problem{s} in the model configuration"


class CheckpointError(ProblemsError):
    """A checkpoint is damaged or does not fit its configuration; each problem names the tensor and the file."""

    exit_code = 4
    headline = "{where}: {count} problem{s} in the checkpoint"


class RecipeError(AtomcError):
    """A weight recipe cannot be evaluated: a source is missing, or its shape or dtype is not what the step needs."""

    exit_code = 5
