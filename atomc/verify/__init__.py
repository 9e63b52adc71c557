"""Numerics of a compiled plan, step by step, against float64; its weights against the checkpoint they came from."""

from atomc.verify.errors import VerifyError
from atomc.verify.judge import Verdict
from atomc.verify.run import Options, StepReport, Verification, verify_artifact, verify_steps
from atomc.verify.steps import Observation, examine, observe

__all__ = [
    "Observation", "Options", "StepReport", "Verdict", "Verification", "VerifyError", "examine", "observe",
    "verify_artifact", "verify_steps",
]  # fmt: skip
