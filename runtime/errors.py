"""What goes wrong while serving: a request that cannot be served, or an engine that cannot serve any."""

from __future__ import annotations

from atomc.errors import AtomcError


class RequestError(AtomcError):
    """A request is wrong or too large: nothing ran for it, and other requests are not touched.

    `param` is the field at fault, `code` a short name of the problem; the server puts both into its 4xx answer.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ServingError(AtomcError):
    """The artifact's serving limits and the memory given to its caches cannot serve even one request."""


class EngineError(AtomcError):
    """The executor failed in a step. The state of the caches is unknown, so no request can go on."""


class UnavailableError(AtomcError):
    """The engine takes no more requests: it failed, is shutting down, or its queue is full."""


class BatchError(AtomcError):
    """A step larger than the artifact is compiled for: a defect of the scheduler, not of a request."""


class RankError(AtomcError):
    """A rank of the run, or its front end, was lost: it died, is silent or late. All others stop with this error.

    `ranks`: the lost one, or those that stand at the same place and do not come on (-1: the front end, -2: the store
    of the launcher). `step`: where they were last heard.
    """

    def __init__(self, message: str, *, ranks: tuple[int, ...], step: int) -> None:
        super().__init__(message)
        self.ranks = ranks
        self.step = step


class AddressError(AtomcError):
    """An address that cannot be listened on."""

    exit_code = 2
