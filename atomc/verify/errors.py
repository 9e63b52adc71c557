"""What goes wrong in `atomc verify`: a bound that does not hold, or an artifact or text that cannot be verified."""

from __future__ import annotations

from atomc.errors import AtomcError


class VerifyError(AtomcError):
    """A bound is broken, or verifying is impossible; the message names the step, the tensor and the source line."""
