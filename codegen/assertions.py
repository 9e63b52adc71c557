"""What is asserted of every code object, read from its assembly: it computes as it was meant to, not only correctly.

Terms:
    product      a kernel that asks for a matrix product, itself or by a function that it calls.
    exempt       what is known not to hold, with the reason: of a kernel, where its constants have given values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from atomc.artifact.kernels import KernelFacts
from atomc.codegen.device import Variant
from atomc.targets import Target

Assertion = Literal["matrix", "spills", "wide loads"]


@dataclass(frozen=True)
class Exempt:
    """An assertion that a kernel is exempt from where its constants have these values, and why.

    `most`: of spills, the bytes that are let pass.
    """

    assertion: Assertion
    kernel: str
    constants: Mapping[str, Any]
    why: str
    most: int = 0


EXEMPT: Final = (
    Exempt("matrix", "turn_queries", {"ROUND": False}, "only what is rounded goes through the Hadamard matrix"),
    Exempt("wide loads", "turn_queries", {"HB": 16}, "of at most 16 heads a lane has 8 bytes, or fewer"),
    Exempt(
        "wide loads", "scaled_gemm", {"W_PACKED": True, "MX": False, "BK": 32},
        "FP4 weights without an instruction for them: a step has 16 bytes of a row, and several lanes share them",
    ),
    Exempt(
        "spills", "attend_apart", {},
        "what an item needs at its ends, and what looks rows up, waits in memory; nothing of a tile does", most=112,
    ),
    Exempt(
        "spills", "experts_folded", {}, "what a tile needs at its ends waits in memory; no step of K has one", most=64
    ),
)  # fmt: skip


def has_product(kernel: Any) -> bool:
    """Whether a Triton function, or one that it calls, asks for a matrix product."""
    from triton.runtime.jit import JITFunction

    named = (kernel.fn.__globals__.get(name) for name in kernel.fn.__code__.co_names)
    asked = any(word in kernel.src for word in ("tl.dot", "warpgroup_mma("))  # in Triton, in Gluon
    return asked or any(has_product(called) for called in named if isinstance(called, JITFunction))


def is_exempt(assertion: Assertion, variant: Variant) -> bool:
    """Whether EXEMPT has the variant."""
    return any(covers(e, assertion, variant) for e in EXEMPT)


def covers(exempt: Exempt, assertion: Assertion, variant: Variant) -> bool:
    """Whether an exemption is of that assertion and of the variant."""
    constants = dict(variant.constants)
    same = (exempt.assertion, exempt.kernel) == (assertion, variant.name)
    return same and all(constants[name] == value for name, value in exempt.constants.items())


def faults_of(variant: Variant, facts: KernelFacts, target: Target) -> list[str]:
    """What does not hold of a code object; empty: all does."""
    found = []
    if facts.shared > target.shared_bytes:
        found.append(f"{facts.shared} bytes of shared memory, of {target.shared_bytes}")
    if facts.spills > max((e.most for e in EXEMPT if covers(e, "spills", variant)), default=0):
        found.append(f"{facts.spills} bytes of registers are spilled")
    if facts.dependent != target.dependent_launch:
        found.append("it waits for the launch before it" if facts.dependent else "it waits for no launch before it")
    product = has_product(variant.kernel) and not is_exempt("matrix", variant)
    if bool(facts.matrix) != product:
        found.append(f"matrix instructions {facts.matrix}" if facts.matrix else "a product without matrix instructions")
    if product and not facts.wide_loads and not is_exempt("wide loads", variant):
        found.append(f"none of its {facts.loads} loads has 16 bytes")
    return found
