"""The command line on good input: every command, what it prints, what `--json` writes, how fast it is there."""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import re
import resource
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

import atomc
from atomc.cli.compile import _kernels
from atomc.codegen import hosts
from tests.support.artifact import LAYERS, ONE_LAYER, write_checkpoint
from tests.support.cli import PROGRAM, Cli, environment, run_apart, start

COMMANDS = ("compile", "generate", "serve", "inspect", "explain", "verify", "eval", "passes", "targets")
REGIONS = ("prologue", "layer_swa_hash", "layer_hca_topk", "layer_csa_topk", "head")


# -- help --------------------------------------------------------------------------------------------------------------


def test_help_takes_less_than_0_3_seconds() -> None:
    """Of processor time, which other processes of the machine do not change; the best of a few."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*PROGRAM, "--help"], env=environment(), check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) < 0.3


@pytest.mark.parametrize("args", [["--help"], ["targets"], ["compile", "x", "--target", "none"]])
def test_what_needs_no_tensor_does_not_load_torch(args: list[str]) -> None:
    code = (
        "import sys; from atomc.cli.app import app; from atomc.cli.failure import run\n"
        f"run(app, {args!r}); print('torch' in sys.modules, 'fastapi' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert ran.stdout.endswith("False False\n"), ran.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(cli: Cli, command: str) -> None:
    ran = cli(command, "--help")
    assert ran.code == 0
    assert f"Usage: atomc {command}" in ran.out
    assert command in cli("-h").out


def test_version(cli: Cli) -> None:
    assert cli("--version").out == f"atomc {atomc.__version__}\n"


# -- compile -----------------------------------------------------------------------------------------------------------


def test_compile_sums_up_what_it_did(model_folder: Path) -> None:
    summary = json.loads((model_folder / "tiny.json").read_text())
    assert summary["target"] == "cpu"
    assert summary["regions"] == dict.fromkeys(REGIONS, 1)
    assert summary["nodes_after"] < summary["nodes_before"]
    assert summary["matches"]["fuse_hc_pre"] == 6
    assert summary["sha256"] == _sha256(model_folder / "tiny.atom" / "manifest.json")
    assert summary["max_context"] == 320
    packed = summary["packed"]
    assert (packed["shards"], packed["resumed_shards"]) == (1, 0)
    assert packed["bytes"] > summary["weights_bytes"]  # a header too
    assert packed["mb_per_second"] > 0
    for size in ("parameters", "weights_bytes", "arena_bytes", "values_bytes", "peak_rss_bytes", "seconds", "steps"):
        assert summary[size] > 0, size


def test_compile_stops_after_a_pass_and_dumps_the_graphs(cli: Cli, tmp_path: Path) -> None:
    model, dump = write_checkpoint(tmp_path / "model", **ONE_LAYER), tmp_path / "ir"
    output = tmp_path / "out.atom"
    ran = cli("compile", model, "-o", output, "--dump-ir", dump, "--stop-after", "fuse_hc_head")
    assert ran.code == 0, ran.err
    assert "no artifact is written" in ran.out
    assert not output.exists()
    names = sorted(f.name for f in (dump / "head").iterdir())
    assert names == ["00_captured.py", "01_canonicalize.py", "02_fuse_hc_pre.py", "03_fuse_hc_head.py"]
    assert "atom.hc_head" in (dump / "head" / "03_fuse_hc_head.py").read_text()


def test_compile_cuts_for_many_ranks_and_proves_it(cli: Cli, tmp_path: Path) -> None:
    model, output, dump = write_checkpoint(tmp_path / "model", **ONE_LAYER), tmp_path / "out.atom", tmp_path / "ir"
    layouts = ("--parallel", "moe=ep,dp=2", "--parallel", "tp=2", "--parallel", "dp=2,moe=ep")
    ran = cli("compile", model, "-o", output, *layouts, "--no-weights", "--scheme", "none", "--dump-ir", dump)
    assert ran.code == 0, ran.err
    assert "dp=2,moe=ep: decode by gather, prefill by route; 3 collectives a step at most, alike on" in ran.out
    assert "tp=2,moe=tp: decode by gather" in ran.out
    cut = [f.name.split("_", 1)[1] for f in sorted((dump / "layer_swa_hash__dp2_moeep_route").iterdir())]
    assert cut == ["shard.py", "dead_code.py"]
    assert "all_to_all_single" in (output / "graph" / "layer_swa_hash__dp2_moeep_route.py").read_text()
    assert "| dp=2,moe=ep | 2 | prefill | route | 3 |" in (output / "report.md").read_text()
    found = cli("verify", "--collectives", output, "--json").json["layouts"]
    assert [(one["layout"], one["ranks"], one["longest_step"]) for one in found] == [
        ("dp=2,moe=ep", 2, 3), ("tp=2,moe=tp", 2, 4),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("parallel", "why"),
    [
        ("dp=1,tbo=all", "one rank has no collectives to overlap; leave tbo out"),
        ("pp=2", "'pp=2' is none of dp=N"),
    ],
)
def test_compile_refuses_what_it_cannot_do_for_many_ranks(cli: Cli, tmp_path: Path, parallel: str, why: str) -> None:
    ran = cli("compile", "deepseek-v4-nano", "-o", tmp_path / "out.atom", "--parallel", parallel)
    assert ran.code == 2
    assert why in " ".join(ran.err.split())
    assert not (tmp_path / "out.atom").exists()
    cli("compile", "deepseek-v4-nano", "--parallel", "dp=2", "--stop-after", "dead_code").failed(2, "--parallel out")


def test_a_gpu_target_says_which_operators_have_no_kernel(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for op in ("atom.moe_experts.default", "aten.bmm.default"):
        monkeypatch.delitem(hosts.HOSTS, op)
    model, output = write_checkpoint(tmp_path / "model", **ONE_LAYER), tmp_path / "out.atom"
    options = ("--target", "mi355x", "-o", output, "--scheme", "none")
    ran = cli("compile", model, *options)
    ran.failed(6, "target mi355x: no kernel for", "atom.moe_experts.default", "deepseek_v4/")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model"]
    error = cli("compile", model, *options, "--no-weights", "--json").json["error"]
    assert error["exit_code"] == 6
    assert {"op", "region", "count", "source"} == set(error["missing"][0])
    assert "aten.bmm.default" in {missing["op"] for missing in error["missing"]}


def test_what_is_wrong_with_kernels_is_shown() -> None:
    assert _kernels(7, {}) == "7, none with faults in the assembly"
    faults = {
        f"gemm {i}": ["a product without matrix instructions", "none of its 3 loads has 16 bytes"] for i in range(5)
    }
    first, *named, more = _kernels(7, faults).split("\n")
    assert first == "7, 5 with faults in the assembly" and len(named) == 3
    assert named[0] == "gemm 0: a product without matrix instructions; none of its 3 loads has 16 bytes"
    assert more == "and 2 more: --json lists them"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- explain, inspect, passes, targets ---------------------------------------------------------------------------------


def test_explain_shows_every_pass_in_every_region(cli: Cli, artifact: Path) -> None:
    ran = cli("explain", artifact)
    assert ran.code == 0
    header = next(line for line in ran.out.splitlines() if "prologue" in line)
    assert [word for word in header.replace("┃", " ").split() if word != "pass"] == list(REGIONS)
    row = next(line for line in ran.out.splitlines() if "fuse_rms_norm " in line)
    assert re.sub(r"[│\s]+", " ", row).split() == ["fuse_rms_norm", "·", "4/4", "5/5", "6/6", "1/1"]
    assert "Nothing was refused." in ran.out


def test_explain_leads_to_the_source_lines(cli: Cli, artifact: Path) -> None:
    ran = cli("explain", artifact, "--pass", "fuse_rope", "--region", "layer_csa_topk")
    assert ran.out.count("deepseek_v4/attention.py:") == 5
    assert "attn.indexer" in ran.out
    found = cli("explain", artifact, "--pass", "fuse_rope", "--json").json
    assert list(found) == list(REGIONS)
    assert [len(found[region][0]["matches"]) for region in REGIONS] == [0, 2, 3, 5, 0]


def test_explain_compiles_a_model_and_writes_nothing(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "model", **ONE_LAYER)
    monkeypatch.chdir(tmp_path)
    found = cli("explain", "model", "--json").json
    assert list(found) == ["prologue", "layer_swa_hash", "head"]
    assert {row["name"]: row["promised"] for row in found["head"]}["fuse_hc_head"] == 1
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


def test_inspect_shows_facts_and_checks_files(cli: Cli, artifact: Path) -> None:
    ran = cli("inspect", artifact)
    assert ran.code == 0
    assert "files, every sha256 as in the manifest" in ran.out
    assert _sha256(artifact / "manifest.json") in ran.out
    assert "atom.moe_experts" in ran.out
    facts = cli("inspect", artifact, "--json").json
    assert facts["verified"] is True
    assert facts["regions"]["layer_csa_topk"]["uses"] == 1
    assert facts["operators"]["atom.moe_experts.default"] == 3
    weights = sum(f["bytes"] for name, f in facts["files"].items() if name.startswith("weights/"))
    assert 0 <= weights - facts["memory"]["weights_bytes"] < 30_000  # safetensors' headers


def test_inspect_prints_a_plan_to_read(cli: Cli, artifact: Path) -> None:
    lines = cli("inspect", artifact, "--plan", "layer_swa_hash").out.splitlines()
    assert "weight    attn_norm.weight: float32[64]" in lines
    step = next(line for line in lines if "atom.route_hash" in line)
    assert re.search(r"%\d+: int64\[T, 3\] = atom\.route_hash\(%\d+, batch\.ids, ffn\.gate\.tid2eid, ", step)
    assert re.search(r"# deepseek_v4/moe\.py:\d+$", step)
    assert any(re.fullmatch(r"output    h = %\d+", line) for line in lines)


def test_inspect_draws_the_memory_plan(cli: Cli, artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "memory.html"
    assert cli("inspect", artifact, "--html", path).code == 0
    page = path.read_text()
    assert all(f'id="{region}"' in page for region in REGIONS)
    plans = {f.stem: json.loads(f.read_text()) for f in (artifact / "plan").glob("*.json")}
    buffers = [s for name in REGIONS for s in plans[name]["slots"] if s["offset"] is not None]
    assert page.count('class="buffer"') == len(buffers) > 50
    assert "http" not in page  # it loads nothing
    assert [f.name for f in tmp_path.iterdir()] == ["memory.html"]


def test_passes_are_listed_with_their_contracts(cli: Cli) -> None:
    found = cli("passes", "--json").json
    assert [found[0]["pass"], found[-1]["pass"]] == ["canonicalize", "dead_code"]
    assert all(entry["contract"] for entry in found)
    assert found[0]["contract"].startswith("one spelling for each operation")
    text = cli("passes").out
    assert all(entry["pass"] in text for entry in found)


def test_targets_are_listed(cli: Cli) -> None:
    found = cli("targets", "--json").json
    assert [t["name"] for t in found][:2] == ["cpu", "mi355x"]
    assert "gfx950" in cli("targets").out


def test_the_report_is_a_page_to_read(artifact: Path) -> None:
    report = (artifact / "report.md").read_text()
    assert report.startswith("# checkpoint for cpu\n")
    assert "| fuse_rms_norm | 0 | 4/4 | 5/5 | 6/6 | 1/1 |" in report
    for heading in ("Regions", "Memory", "Matches of each pass", "Operators of one step"):
        assert f"\n## {heading}\n" in report


# -- generate, eval, load ----------------------------------------------------------------------------------------------


def test_generate_prints_the_text_and_nothing_else(cli: Cli, artifact: Path) -> None:
    args = ("generate", artifact, "hello world", "--max-tokens", "12", "--ignore-eos")
    ran = cli(*args, "--temperature", "1", "--seed", "3", "--stats")
    assert ran.code == 0, ran.err
    whole = cli(*args, "--temperature", "1", "--seed", "3", "--json").json
    assert ran.out == whole["completions"][0]["text"] + "\n"
    assert whole["completions"][0]["finish_reason"] == "length"
    assert whole["completion_tokens"] == 12
    assert re.search(r"^3 prompt tokens, 12 generated in .* tokens/s\), first token after", ran.err)


def test_generate_answers_several_prompts_as_if_alone(cli: Cli, artifact: Path) -> None:
    prompts = ("hello", "def f(x):", "the thing " * 8)
    args = ("--max-tokens", "8", "--ignore-eos")
    alone = [cli("generate", artifact, prompt, *args).out.removesuffix("\n") for prompt in prompts]
    together = cli("generate", artifact, *prompts, *args)
    expected = [f"==> prompt {i} of 3 <==\n{text}\n" for i, text in enumerate(alone, start=1)]
    assert together.out == "\n".join(expected)


def test_generate_samples_as_the_model_wants(cli: Cli, artifact: Path) -> None:
    """generation_config.json says do_sample: false; options go before it."""
    args = ("generate", artifact, "the other", "--max-tokens", "10", "--ignore-eos", "--json")
    greedy = [cli(*args).json["completions"] for _ in range(2)]
    assert greedy[0] == greedy[1] == cli(*args, "--temperature", "0").json["completions"]
    hot = [cli(*args, "--temperature", "2", "--seed", str(seed)).json["completions"] for seed in (1, 2)]
    assert hot[0] != hot[1]


def test_generate_reads_standard_input_and_chats(cli: Cli, artifact: Path) -> None:
    args = ("--max-tokens", "4", "--ignore-eos", "--json")
    ran = run_apart("generate", artifact, "-", *args, stdin=open("/dev/null"))  # noqa: SIM115
    assert ran.json["prompt_tokens"] == 1  # BOS alone
    chat = cli("generate", artifact, "hello", "--chat", *args)
    assert chat.json["prompt_tokens"] == cli("generate", artifact, "hello", *args).json["prompt_tokens"] + 3


def test_eval_reads_documents_of_every_kind(cli: Cli, artifact: Path, tmp_path: Path) -> None:
    texts = ["hello world, hello there", "", "the theory of the thing " * 30, "é" * 40]
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))
    (tmp_path / "some.jsonl").write_text(lines)
    (tmp_path / "some.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    found = cli("eval", artifact, tmp_path / "some.jsonl", "--json").json
    assert found["documents"] == 4
    assert found["bytes"] == sum(len(text.encode()) for text in texts)
    assert found["bits_per_byte"] * found["bytes"] > found["tokens"]
    packed = cli("eval", artifact, tmp_path / "some.jsonl.xz", "--json").json
    assert packed["bits_per_byte"] == found["bits_per_byte"]
    (tmp_path / "one.txt").write_text(texts[0])
    alone = cli("eval", artifact, tmp_path / "one.txt", "--json").json
    limited = cli("eval", artifact, tmp_path / "some.jsonl", "--limit-bytes", "24", "--json").json
    assert alone["bits_per_byte"] == pytest.approx(limited["bits_per_byte"], rel=1e-6)
    assert "bits per byte" in cli("eval", artifact, tmp_path / "one.txt").out


def test_eval_is_the_cross_entropy_of_the_logits(cli: Cli, artifact: Path, tmp_path: Path) -> None:
    """Against one step of the executor over the whole document, in a batch that the runtime did not build."""
    import torch

    from atomc.runtime.capacity import open_executor
    from atomc.runtime.detokenize import Vocabulary
    from tests.support.eager import make_batch, new_caches
    from tests.support.tiny import tiny_config

    (tmp_path / "some.txt").write_text(text := "def f(x): return there is the other thing")
    executor, _ = open_executor(artifact, num_blocks=8, num_window_pages=32)
    ids = torch.tensor([0, *Vocabulary.from_file(executor.tokenizer_path).encode(text), 1])
    config = tiny_config(**LAYERS)
    logits = executor.step(make_batch(config, [(0, 0, ids)], new_caches(config, 1, 320, longest_step=48)))
    bits = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none").double() / math.log(2)
    for eos, expected in (("--no-eos", bits[:-1].sum()), ("--eos", bits.sum())):
        found = cli("eval", artifact, tmp_path / "some.txt", eos, "--json").json
        assert found["bits_per_byte"] == pytest.approx(float(expected) / len(text), rel=1e-5)
        assert found["tokens"] == len(ids) - 1 - (eos == "--no-eos")


def test_load_gives_an_object_that_generates(cli: Cli, artifact: Path) -> None:
    from atomc.runtime.request import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    answer = atomc.load(str(artifact), max_requests=2).generate("hello", greedy)[0]
    ran = cli("generate", artifact, "hello", "--max-tokens", "6", "--ignore-eos", "--temperature", "0")
    assert ran.out == answer.text + "\n"


def test_importing_atomc_loads_nothing_heavy() -> None:
    code = "import sys, atomc; print('torch' in sys.modules, callable(atomc.load))"
    ran = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert ran.stdout == "False True\n"


# -- serve -------------------------------------------------------------------------------------------------------------


def test_serve_says_what_it_serves_and_ends_on_sigterm(artifact: Path) -> None:
    server = start("serve", artifact, "--port", "0", "--name", "tiny", "--max-requests", "2")
    try:
        head = [server.stdout.readline() for _ in range(3)]  # type: ignore[union-attr]
        assert head[0] == f"tiny from {artifact}, target cpu\n"
        assert "2 requests, all at 320 tokens" in head[1]
        url = head[2].split()[0].removesuffix("/v1/completions")
        _wait_for(url)
        body = json.dumps({"model": "tiny", "prompt": "hello", "max_tokens": 3}).encode()
        with urllib.request.urlopen(f"{url}/v1/completions", body) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] <= 3
        server.send_signal(signal.SIGTERM)
        out, err = server.communicate(timeout=60)
    finally:
        server.kill()
    assert server.returncode == 0, err
    assert out.endswith("stopped.\n")
    assert "Traceback" not in err


def _wait_for(url: str) -> None:
    for _ in range(300):
        try:
            with urllib.request.urlopen(f"{url}/health"):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"{url} does not answer")


# -- layouts -----------------------------------------------------------------------------------------------------------


def test_explain_shows_how_everything_is_stored(cli: Cli, native_artifact: Path) -> None:
    out = cli("explain", native_artifact, "--layouts").out
    assert "decided by" in out and "native, rule 3" in out
    stored = cli("explain", native_artifact, "--layouts", "--region", "layer_csa_topk", "--json").json
    rows = {row["name"]: row for row in stored["layer_csa_topk"]}
    assert rows["ffn.experts.w13"]["layout"] == "e2m1:1x32:e8m0"
    assert rows["ffn.experts.w13"]["origin"] == "stored"
    assert rows["input of attn.wq_b"]["kind"] == "activation"
    assert "Hadamard rotation on both sides" in rows["index_rows"]["lowering"]
    assert "all weights" in cli("explain", native_artifact).out


def test_inspect_adds_up_the_memory_of_a_batch(cli: Cli, native_artifact: Path) -> None:
    plan = cli("inspect", native_artifact, "--batch", "7", "--context", "1000", "--json").json["memory_plan"]
    assert (plan["requests"], plan["context"]) == (7, 1000)
    assert plan["total_bytes"] == sum(v for k, v in plan.items() if k.endswith("_bytes") and k != "total_bytes")
    assert (
        "memory of 7 requests of 1,000 tokens"
        in cli("inspect", native_artifact, "--batch", "7", "--context", "1000").out
    )


def test_schemes_are_listed_and_bad_ones_refused(cli: Cli, tmp_path: Path) -> None:
    assert {"native", "ptpc-fp8", "none"} <= cli("schemes", "--json").json.keys()
    assert "as the checkpoint stores it" in cli("schemes").out
    model = write_checkpoint(tmp_path / "model", **ONE_LAYER)
    for flag, value, words in (
        ("--scheme", "int4", "choose one of native"), ("--cache-rows", "fp4", "choose one of compute, bf16, fp8"),
        ("--index-rows", "int8", "choose one of compute"), ("--scales", "best", "choose one of amax, mse"),
        ("--calibration", "nowhere.safetensors", "cannot be read"),
    ):  # fmt: skip
        cli("compile", model, "-o", tmp_path / "x.atom", flag, value).failed(1, f"{flag} {value}", words)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model"]


def test_a_calibration_from_text_to_artifact(cli: Cli, artifact: Path, model_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("class Queue:\n    def put(self, item):\n        self.items.append(item)\n" * 40)
    made = cli(
        "calibrate", artifact, text, "-o", tmp_path / "c.safetensors", "--samples", "4", "--length", "200", "--json"
    )
    assert made.json["pieces"] == 4 and made.json["weights"] > 20
    compiled = cli(
        "compile", model_folder / "checkpoint", "-o", tmp_path / "x.atom", "--scheme", "ptpc-fp8", "--calibration",
        tmp_path / "c.safetensors", "--json",
    )  # fmt: skip
    assert compiled.code == 0
    assert cli("inspect", tmp_path / "x.atom", "--json").json["scales"] == "calibrated"
    cli("calibrate", tmp_path / "x.atom", text, "-o", tmp_path / "d.safetensors").failed(1, "has the scheme ptpc-fp8")
    assert not (tmp_path / "d.safetensors").exists()
