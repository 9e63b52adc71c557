"""`--bisect`: the first step that breaks its bound, cut to the fewest tokens that still do, as a small repro.

Contract:
    The folder holds `step.json` (operator, arguments, layouts, what is wrong), `inputs.safetensors` (tensor arguments,
    and the results that were found) and `repro.py`, which needs nothing but atomc. If the step is right when it runs
    again on its own inputs, nothing is cut, and the repro shows the results of the run. Of a step on a GPU the folder
    has the kernels too, and `plan.json`, what launches them: to run it again takes that GPU, but no compiler.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from atomc.artifact.kernels import FOLDER
from atomc.artifact.plan import RegionPlan
from atomc.artifact.store import decode, encode
from atomc.errors import AtomcError
from atomc.ops import OPS
from atomc.ops.registry import NAMESPACE
from atomc.verify.errors import VerifyError
from atomc.verify.judge import Verdict, worst
from atomc.verify.launched import Launched, moved
from atomc.verify.steps import Observation, examine, mutates, named_arguments, observe
from atomc.verify.watching import Failure

FILES: Final = ("step.json", "inputs.safetensors", "repro.py")
_ERRORS: Final = (RuntimeError, ValueError, IndexError, TypeError, AssertionError, KeyError, AtomcError)

REPRO: Final = '''\
"""{op}: {where}

Run it: python repro.py [FOLDER]. Found by `atomc verify --bisect`; needs atomc only.
"""

import sys
from pathlib import Path

from atomc.verify import VerifyError, examine
from atomc.verify.bisect import again, read_repro

folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
recorded = read_repro(folder)  # the step's arguments, and what the plan's run gave for them
print(recorded.op)
for name, value in recorded.arguments.items():
    print(f"  {{name}} =", f"{{list(value.shape)}} {{value.dtype}}" if hasattr(value, "shape") else repr(value))
for what in ("recorded", "now"):
    try:
        seen = recorded if what == "recorded" else again(recorded)  # the same step, run again
    except VerifyError as error:
        sys.exit(str(error))
    for verdict in examine(seen):
        print(f"{{what}}: {{verdict.what}}: {{'ok' if verdict.ok else 'BROKEN'}} {{verdict.why}}")
        print(f"  relative error {{verdict.error:.3e}}, bound {{verdict.bound:.3e}}")
        print(f"  at {{list(verdict.index)}}: {{verdict.found!r}}, in float64 {{verdict.expected!r}}")
'''


@dataclass(frozen=True)
class Repro:
    """What was written: the folder, tokens before and after, and the verdict that is left."""

    folder: Path
    before: int
    after: int
    verdict: Verdict


def bisect(failure: Failure, folder: Path) -> Repro:
    """Reduce a failure and write its repro. Raises `VerifyError` if the folder cannot be written."""
    seen, before = failure.seen, _tokens(failure.seen)
    if _wrong(seen, seen.arguments):
        seen = again(seen, _fewest(failure))
    try:
        write_repro(folder, seen, failure.report.message())
    except OSError as error:
        raise VerifyError(f"--bisect {folder}: cannot be written ({error.strerror}). Choose another folder.") from error
    return Repro(folder, before, _tokens(seen), worst(examine(seen)))


def again(seen: Observation, arguments: dict[str, Any] | None = None) -> Observation:
    """The same step run again, where it ran: on its own arguments, or on others.

    Raises:
        VerifyError: it ran on a GPU that this machine has not.
    """
    return observe(seen.op, seen.arguments if arguments is None else arguments, seen.reserved, seen.launched)


def _wrong(seen: Observation, arguments: dict[str, Any]) -> bool:
    """Whether a step breaks a bound on these arguments; one that does not run on them does not."""
    try:
        return any(not v.ok for v in examine(again(seen, arguments)))
    except _ERRORS:
        return False


def _token_argument(op: str) -> str:
    namespace, name, _ = op.split(".")
    if namespace == NAMESPACE:
        return OPS[name].tokens
    overload = getattr(getattr(torch.ops, namespace), name)
    return str(getattr(overload, op.split(".")[2])._schema.arguments[0].name)


def _tokens(seen: Observation) -> int:
    value = seen.arguments.get(_token_argument(seen.op))
    return value.shape[0] if isinstance(value, Tensor) and value.dim() else 1


# -- fewer tokens ------------------------------------------------------------------------------------------------------


def _fewest(failure: Failure) -> dict[str, Any]:
    """Arguments of the fewest tokens found by halving, then by leaving out ends, that still break the bound."""
    seen = failure.seen
    first, last = 0, _tokens(seen)

    def wrong(a: int, b: int) -> bool:
        return b > a and _wrong(seen, _cut(failure, a, b))

    if _token_argument(seen.op) not in failure.tokens or not wrong(first, last):
        return seen.arguments
    while last - first > 1:
        middle = (first + last) // 2
        if wrong(first, middle):
            last = middle
        elif wrong(middle, last):
            first = middle
        else:
            break
    step = (last - first) // 2
    while step:
        if wrong(first + step, last):
            first += step
        if wrong(first, last - step):
            last -= step
        step //= 2
    return _cut(failure, first, last)


def _cut(failure: Failure, a: int, b: int) -> dict[str, Any]:
    """The arguments of tokens a to b: rows of what is per token; the requests' first tokens move with them."""
    seen, count = failure.seen, _tokens(failure.seen)
    changed = dict(seen.arguments)
    for name in failure.tokens:
        value = changed[name]
        if name == "query_start" and _token_argument(seen.op) != "ends":
            changed[name] = (value.clamp(a, b) - a).to(value.dtype)
        elif name not in mutates(seen.op) and isinstance(value, Tensor) and value.dim() and value.shape[0] == count:
            changed[name] = moved(value[a:b], value.device)
    return changed


# -- files -------------------------------------------------------------------------------------------------------------


def write_repro(folder: Path, seen: Observation, message: str) -> None:
    """Write the three files; of a step on a GPU its plan and kernels too."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}

    def keep(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value.detach().cpu().clone().contiguous()
            dtype = str(value.dtype).removeprefix("torch.")
            return {"tensor": name, "shape": list(value.shape), "stride": list(value.stride()), "dtype": dtype}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        return [keep(f"{name}.{i}", v) for i, v in enumerate(value)] if isinstance(value, list) else value

    step = {
        "op": seen.op, "error": message, "reserved": sorted(seen.reserved),
        "arguments": {name: keep(f"argument.{name}", value) for name, value in seen.arguments.items()},
        "layouts": {n: v for n, v in seen.arguments.items() if isinstance(v, str)},
        "results": [keep(f"result.{i}", value) for i, value in enumerate(seen.results)],
        "mutated": {name: keep(f"mutated.{name}", value) for name, value in seen.mutated.items()},
        "launched": _keep_launched(folder, seen.launched),
    }  # fmt: skip
    save_file(tensors, folder / "inputs.safetensors")
    (folder / "step.json").write_text(json.dumps(step, indent=2) + "\n", encoding="utf-8")
    script = REPRO.format(op=seen.op.removesuffix(".default"), where=message.partition(":")[0])
    (folder / "repro.py").write_text(script, encoding="utf-8")


def _keep_launched(folder: Path, launched: Launched | None) -> dict[str, Any] | None:
    if launched is None:
        return None
    (folder / FOLDER).mkdir(exist_ok=True)
    (folder / "plan.json").write_bytes(encode(launched.plan))
    for key in launched.kernels():
        for file in (launched.folder / FOLDER).glob(f"{key}.*"):
            shutil.copyfile(file, folder / FOLDER / file.name)
    return {"target": launched.target, "sizes": launched.sizes}


def _read_launched(folder: Path, found: dict[str, Any] | None) -> Launched | None:
    if found is None:
        return None
    plan = decode((folder / "plan.json").read_bytes(), RegionPlan, "plan.json")
    step = plan.steps[0]
    given = named_arguments(step.op, step.args, step.kwargs)
    return Launched(found["target"], folder, plan, given, found["sizes"])


def read_repro(folder: Path) -> Observation:
    """The step that `write_repro` wrote. Raises `VerifyError` if the files are not there."""
    try:
        step = json.loads((folder / "step.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "inputs.safetensors")
        launched = _read_launched(folder, step["launched"])
    except OSError as error:
        raise VerifyError(f"{folder} holds no step: {error.strerror}. `atomc verify --bisect` writes one.") from error

    def value(found: Any) -> Any:
        if isinstance(found, dict):
            if "tensor" in found:
                return moved(tensors[found["tensor"]], "cpu", found["stride"])
            return getattr(torch, found["dtype"])
        return [value(v) for v in found] if isinstance(found, list) else found

    parts = ({name: value(v) for name, v in step[key].items()} for key in ("arguments", "mutated"))
    arguments, mutated = parts
    reserved = frozenset(step["reserved"])
    return Observation(step["op"], arguments, tuple(value(step["results"])), mutated, reserved, launched)
