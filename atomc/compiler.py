"""The compiler: one function that reads top to bottom, from a model's name to an artifact on disk."""

from __future__ import annotations

import hashlib
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import safetensors
import torch
from safetensors.torch import save_file

import atomc
from atomc.artifact.check import check_program
from atomc.artifact.manifest import SCHEMA_VERSION, Limits, Manifest, Serving
from atomc.artifact.plan import CallPlan, ProgramPlan, RegionPlan, StateTensor
from atomc.artifact.store import artifact_hash, check_output, encode, write_manifest, writing
from atomc.capture import Input, Program, Region, capture
from atomc.codegen.lower import Lowering
from atomc.codegen.missing import missing_kernels, refuse
from atomc.errors import AtomcError
from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.models.deepseek_v4.promises import promised_matches
from atomc.models.source import ModelSource, open_model
from atomc.passes import pipelines
from atomc.passes.graph import location
from atomc.passes.runner import Context, Row, run_pipeline
from atomc.recipes import Recipe, evaluate, instantiate
from atomc.report import Explanation, explanation_of, write_report
from atomc.targets import Target, get_target

SHARD_BYTES = 512 << 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
Progress = Callable[[str, int, int], None]  # stage, done, total


class CompileError(AtomcError):
    """An option that no compile can satisfy."""


@dataclass(frozen=True)
class Options:
    """What the user chose; every field that changes the artifact is in its manifest.

    Attributes:
        dtype: compute dtype, `float32` or `bfloat16`. max_context: 0 takes the model's, at most 8192.
        with_weights: pack the checkpoint's weights. dump_ir: folder for the graph after each pass.
        stop_after: label of the pass to stop after; nothing is written then.
    """

    dtype: str = "float32"
    max_context: int = 0
    max_batch_tokens: int = 512
    max_requests: int = 32
    max_logit_rows: int = 512
    with_weights: bool = True
    dump_ir: Path | None = None
    stop_after: str | None = None


@dataclass
class Result:
    """What a compile did. `hash` is None if nothing was written."""

    output: Path | None
    hash: str | None
    model: str
    target: Target
    explanation: Explanation
    program: ProgramPlan | None = None
    regions: dict[str, RegionPlan] = field(default_factory=dict)
    bytes: int = 0


@dataclass
class Compiled:
    """One region after its passes."""

    region: Region
    ctx: Context
    rows: list[Row]


def compile_model(
    model: str, target_name: str, output: Path, options: Options, progress: Progress = lambda *_: None
) -> Result:
    """Compile `model` for a target into the artifact folder `output`.

    Args:
        model: a checkpoint folder, or a bundled name.
    Raises:
        AtomcError: anything the user can mend; nothing is written then.
    """
    target = get_target(target_name)
    if options.stop_after is None:
        check_output(output)
    source = open_model(model, with_weights=options.with_weights)
    limits = check_limits(options, source.config)
    check_stop(options.stop_after)
    serving = serving_facts(source, limits)
    program = trace(source.config, serving, options, progress)
    compiled = [fuse(source, program, region, options, progress) for region in program.regions]
    explanation = explanation_of({c.region.name: c.rows for c in compiled})
    if options.stop_after is not None:
        return Result(None, None, source.name, target, explanation)
    regions = {c.region.name: lower(c, serving) for c in compiled}
    if missing := [m for region in regions.values() for m in missing_kernels(region, target)]:
        raise refuse(missing, target)
    plan = link(program, regions, serving)
    with writing(output) as folder:
        recipes = {c.region.name: named_recipes(c) for c in compiled}
        if options.with_weights:
            pack_weights(source, program, recipes, folder / "weights", progress)
        write_plan(folder / "plan", plan, regions)
        write_graphs(folder / "graph", compiled)
        copy_model_files(source, folder)
        (folder / "explain.json").write_bytes(encode(explanation))
        write_report(folder / "report.md", source.name, target, explanation, plan, regions)
        manifest = write_manifest(
            folder,
            lambda files: Manifest(
                schema=SCHEMA_VERSION, model=source.name, config_sha256=config_hash(source.config), target=target.name,
                dtype=options.dtype, with_weights=options.with_weights, limits=limits, serving=serving, tools=tools(),
                passes={c.region.name: [r.fingerprint for r in c.rows] for c in compiled}, recipes=recipes, files=files,
            ),
        )  # fmt: skip
        check_program(str(output), manifest, plan, regions)
    size = sum(f.stat().st_size for f in output.rglob("*") if f.is_file())
    return Result(output, artifact_hash(output), source.name, target, explanation, plan, regions, size)


def check_limits(options: Options, config: DeepseekV4Config) -> Limits:
    """The limits as chosen, or an error that names the flag and the legal range."""
    context = options.max_context or min(config.max_position_embeddings, 8192)
    for flag, value, most in (
        ("--max-context", context, config.max_position_embeddings),
        ("--max-batch-tokens", options.max_batch_tokens, 1 << 20),
        ("--max-requests", options.max_requests, 1 << 16),
        ("--max-logit-rows", options.max_logit_rows, options.max_batch_tokens),
    ):
        if not 1 <= value <= most:
            raise CompileError(f"{flag} {value} is out of range: 1 to {most} for this model.")
    if options.max_requests > options.max_batch_tokens:
        raise CompileError(
            f"--max-requests {options.max_requests} exceeds --max-batch-tokens {options.max_batch_tokens}: "
            "a decode step holds one token of each request."
        )
    if options.dtype not in DTYPES:
        raise CompileError(f"--dtype {options.dtype} is unknown; choose one of {', '.join(DTYPES)}.")
    return Limits(
        max_context=context, max_batch_tokens=options.max_batch_tokens, max_requests=options.max_requests,
        max_logit_rows=options.max_logit_rows,
    )  # fmt: skip


def check_stop(label: str | None) -> None:
    """Whether there is a pass to stop after."""
    labels = [step.label for step in pipelines.fusion()]
    if label is not None and label not in labels:
        raise CompileError(f"--stop-after {label}: no such pass; choose one of {', '.join(labels)}.")


def serving_facts(source: ModelSource, limits: Limits) -> Serving:
    """Paging and table widths that follow from the model and the limits."""
    from atomc.models.deepseek_v4.state import Paging

    config, paging = source.config, Paging.of(source.config)
    reach = config.sliding_window + limits.max_batch_tokens
    return Serving(
        model_name=source.name, vocab_size=config.vocab_size, bos_id=config.bos_token_id,
        eos_ids=list(config.eos_token_ids), window=config.sliding_window, window_page=paging.window_page,
        block_tokens=paging.block_tokens, csa_ratio=config.csa_ratio, hca_ratio=config.hca_ratio,
        max_context=limits.max_context, max_batch_tokens=limits.max_batch_tokens, max_requests=limits.max_requests,
        max_logit_rows=limits.max_logit_rows, window_table_width=-(-reach // paging.window_page) + 1,
        block_table_width=-(-limits.max_context // paging.block_tokens),
    )  # fmt: skip


def trace(config: DeepseekV4Config, serving: Serving, options: Options, progress: Progress) -> Program:
    """Capture every distinct region."""
    names: list[str] = []

    def on_region(name: str) -> None:
        names.append(name)
        progress(f"capture {name}", len(names), 0)

    tables = serving.window_table_width, serving.block_table_width
    return capture(config, DTYPES[options.dtype], tables, on_region)


def fuse(source: ModelSource, program: Program, region: Region, options: Options, progress: Progress) -> Compiled:
    """Run the passes on one region; a miss of a promised match is an error."""
    progress(f"passes {region.name}", program.regions.index(region) + 1, len(program.regions))
    prefixes = [c.prefix for c in program.calls if c.region == region.name]
    weights = {i.placeholder: i.name for i in region.inputs if i.role == "weight"}
    ctx = Context(
        region.name,
        expected=promised_matches(source.config, region.name),
        weights={p: source.recipe(prefixes, path, options.dtype) for p, path in weights.items()},
        module_paths=dict(weights),
    )
    dump = options.dump_ir / region.name if options.dump_ir is not None else None
    return Compiled(region, ctx, run_pipeline(pipelines.fusion(), region.gm, ctx, dump, options.stop_after))


def lower(compiled: Compiled, serving: Serving) -> RegionPlan:
    """The region's plan."""
    region, ctx = compiled.region, compiled.ctx
    bound = [i for i in region.inputs if i.role != "weight"]
    bound += [Input(placeholder, "weight", path) for placeholder, path in ctx.module_paths.items()]
    inputs = {i.placeholder: (i.role, i.name) for i in bound}
    return Lowering(region.name, region.gm, inputs, region.outputs, region.symbols, serving.bounds(), location).run()


def link(program: Program, regions: dict[str, RegionPlan], serving: Serving) -> ProgramPlan:
    """The program's plan: calls, state, and the memory of values and arenas at the largest step."""
    from atomc.codegen.memory import program_values_bytes

    largest = serving.bounds()
    calls = [CallPlan(c.region, c.prefix, _used(c.binds, regions[c.region])) for c in program.calls]
    states = {
        prefix: [StateTensor(s.name, s.pool, list(s.shape), s.dtype) for s in specs]
        for prefix, specs in program.states.items()
    }
    arena = max(r.arena_bytes for r in regions.values())
    return ProgramPlan(calls, largest, states, program_values_bytes(calls, regions, largest), arena)


def _used(binds: dict[str, str], region: RegionPlan) -> dict[str, str]:
    """The binds of values that the region reads; passes may have left some without a reader."""
    read = {i.name for i in region.inputs if i.role == "value"}
    return {name: value for name, value in binds.items() if name in read}


def named_recipes(compiled: Compiled) -> dict[str, Recipe]:
    """Weight name in the region -> recipe."""
    paths = compiled.ctx.module_paths
    return {paths[p]: recipe for p, recipe in sorted(compiled.ctx.weights.items(), key=lambda kv: paths[kv[0]])}


def pack_weights(
    source: ModelSource, program: Program, recipes: dict[str, dict[str, Recipe]], folder: Path, progress: Progress
) -> None:
    """Evaluate every recipe of every call, streaming, into safetensors shards."""
    folder.mkdir()
    total = sum(len(recipes[c.region]) for c in program.calls)
    shard: dict[str, torch.Tensor] = {}
    held, shards = 0, 0
    for done, (name, tensor) in enumerate(_evaluated(source, program, recipes), start=1):
        progress("pack weights", done, total)
        shard[name] = tensor
        held += tensor.nbytes
        if held >= SHARD_BYTES or done == total:
            shards += 1
            save_file(shard, folder / f"{shards:05d}.safetensors")
            shard, held = {}, 0


def _evaluated(
    source: ModelSource, program: Program, recipes: dict[str, dict[str, Recipe]]
) -> Iterator[tuple[str, torch.Tensor]]:
    for call in program.calls:
        for name, recipe in recipes[call.region].items():
            yield call.prefix + name, evaluate(instantiate(recipe, call.prefix), source.load).contiguous()


def write_plan(folder: Path, plan: ProgramPlan, regions: dict[str, RegionPlan]) -> None:
    """`plan/program.json` and one file for each region."""
    folder.mkdir()
    (folder / "program.json").write_bytes(encode(plan))
    for name, region in regions.items():
        (folder / f"{name}.json").write_bytes(encode(region))


def write_graphs(folder: Path, compiled: list[Compiled]) -> None:
    """The final graph of each region, readable, with source paths relative to the package."""
    from atomc.passes.graph import readable

    folder.mkdir()
    root = re.escape(str(Path(atomc.__file__).parent.parent)) + "/"
    for c in compiled:
        text = re.sub(root, "", readable(c.region.gm))
        (folder / f"{c.region.name}.py").write_text(text, encoding="utf-8")


def copy_model_files(source: ModelSource, folder: Path) -> None:
    """config.json, canonical, and the tokenizer's files where the model has them."""
    (folder / "config.json").write_bytes(encode(source.config.to_dict()))
    for name in TOKENIZER_FILES:
        if source.folder is not None and (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)


def config_hash(config: DeepseekV4Config) -> str:
    """sha256 of the canonical configuration."""
    return hashlib.sha256(encode(config.to_dict())).hexdigest()


def tools() -> dict[str, str]:
    """Versions of what decides the artifact's bytes."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {
        "atomc": atomc.__version__, "torch": torch.__version__.split("+")[0], "python": python,
        "safetensors": safetensors.__version__, "msgspec": msgspec.__version__,
    }  # fmt: skip
