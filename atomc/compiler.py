"""The compiler: one function that reads top to bottom, from a model's name to an artifact on disk."""

from __future__ import annotations

import copy
import hashlib
import platform
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast, get_args

import msgspec
import safetensors
import torch
from torch.fx import GraphModule

import atomc
from atomc.artifact.agreement import Proven, prove_layouts
from atomc.artifact.check import check_program
from atomc.artifact.kernels import KernelFacts, write_kernel
from atomc.artifact.manifest import SCHEMA_VERSION, Limits, Manifest, Serving
from atomc.artifact.order import buckets_of
from atomc.artifact.plan import CallPlan, ProgramPlan, RegionPlan, StateTensor
from atomc.artifact.ranks import FILE as RANKS_FILE
from atomc.artifact.ranks import RanksPlan
from atomc.artifact.store import artifact_hash, check_output, encode, hash_file, write_manifest, writing
from atomc.calibration import SPACE, CalibratedSource, Calibration, fitted
from atomc.capture import Program, Region, capture
from atomc.codegen.aot import Binary, build_all, default_store
from atomc.codegen.assertions import faults_of
from atomc.codegen.device import Variant
from atomc.codegen.missing import missing_kernels, refuse
from atomc.codegen.source import source_of
from atomc.errors import AtomcError
from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.models.deepseek_v4.promises import Rounded, products_of, promised_matches
from atomc.models.deepseek_v4.state import row_layouts
from atomc.models.source import ModelSource, open_model
from atomc.pack import Packed, Packing, Source, weights_of
from atomc.passes import pipelines
from atomc.passes.runner import Context, Pass, run_pipeline
from atomc.passes.scheme import IndexRows, Rows, Scheme, get_scheme
from atomc.ranks import Cutting, layouts_for
from atomc.recipes import Choice, Method, Recipe, TensorSpec, instantiate, output_spec, stored_layout
from atomc.regions import Compiled, copy_context, lower
from atomc.report import Explanation, Layouts, explanation_of, layouts_of, write_report
from atomc.rules import check_rules
from atomc.targets import Target, get_target

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
        scheme: quantisation scheme, a name or a .json file. rows, index_rows: how caches are stored; empty: by the
            scheme. scales: how scales are chosen where weights are quantised, `amax` or `mse`; with `calibration`, a
            file of `atomc calibrate`, by the error of the products.
        with_weights: pack the checkpoint's weights. dump_ir: folder for the graph after each pass.
        stop_after: label of the pass to stop after; nothing is written then.
        parallel: layouts on many ranks, as `atomc.parallel.layout` reads them; one rank is there without being named.
    """

    dtype: str = "float32"
    scheme: str = "native"
    rows: str = ""
    index_rows: str = ""
    scales: str = "amax"
    calibration: Path | None = None
    max_context: int = 0
    max_batch_tokens: int = 512
    max_requests: int = 32
    max_logit_rows: int = 512
    with_weights: bool = True
    dump_ir: Path | None = None
    stop_after: str | None = None
    parallel: tuple[str, ...] = ()


@dataclass
class Result:
    """What a compile did. `hash` is None if nothing was written, `packed` if no weights were.

    `calibrated`: how many of the tensors rounded here the calibration fits, of how many; None without one. `kernels`:
    what is known of each code object, by its key; `faults`: what of it does not hold (`atomc.codegen.assertions`).
    `ranks`: of each layout of more than one, what they send one another, and the proof that they do so alike.
    """

    output: Path | None
    hash: str | None
    model: str
    target: Target
    explanation: Explanation
    layouts: Layouts
    program: ProgramPlan | None = None
    regions: dict[str, RegionPlan] = field(default_factory=dict)
    bytes: int = 0
    packed: Packed | None = None
    calibrated: tuple[int, int] | None = None
    kernels: dict[str, KernelFacts] = field(default_factory=dict)
    faults: dict[str, list[str]] = field(default_factory=dict)
    ranks: list[Proven] = field(default_factory=list)


@dataclass(frozen=True)
class Quantisation:
    """What the options ask of the passes: the scheme with its caches, their row layouts by state field, and those of
    index queries."""

    scheme: Scheme
    target: Target
    rows: dict[str, str]
    index_query: str
    method: Method
    calibration: Calibration | None = None

    def pipeline(self) -> tuple[Pass, ...]:
        """The passes of this compile up to where ranks part."""
        return pipelines.finding(self.scheme, self.target, self.rows, self.index_query)

    def spec_of(self, source: ModelSource) -> Callable[[str], TensorSpec]:
        """Shape and dtype of the checkpoint's tensors, and of the calibration's."""

        def spec(name: str) -> TensorSpec:
            if self.calibration is not None and name.startswith(SPACE):
                return self.calibration.spec(name)
            return source.spec(name)

        return spec

    def how(self) -> str:
        """How scales are chosen, for the manifest."""
        return self.method if self.calibration is None else "calibrated"


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
    else:
        check_stop(options.stop_after, target, options.parallel)
    source = open_model(model, with_weights=options.with_weights)
    limits = check_limits(options, source.config)
    quantisation = check_scheme(options, source.config, target)
    ranked = layouts_for(options.parallel, source.config, quantisation.scheme)
    serving = serving_facts(source, limits)
    program = trace(source.config, serving, options, progress)
    compiled = [
        fuse(source, program, region, quantisation, options, progress, keep=bool(ranked)) for region in program.regions
    ]
    calibrated = check_calibration(compiled, quantisation)
    explanation = explanation_of({c.region.name: c.rows for c in compiled})
    layouts = layouts_of({c.region.name: c.ctx.decisions for c in compiled}, Counter(c.region for c in program.calls))
    if options.stop_after is not None:
        return Result(None, None, source.name, target, explanation, layouts, calibrated=calibrated)
    lowered = {c.region.name: lower(c, serving.bounds(), target) for c in compiled}
    regions = {name: plan for name, (plan, _) in lowered.items()}
    plan = link(program, compiled, regions, serving)
    every = dict(regions)
    cutting = Cutting(compiled, plan, every, target, source.config, serving, options.dump_ir, progress)
    plans = [cutting.layout(layout) for layout in ranked]
    variants = {k: v for _, made in lowered.values() for k, v in made.items()} | cutting.kernels
    if missing := [m for region in regions.values() for m in missing_kernels(region, target)]:
        raise refuse(missing, target)
    ranks = prove_layouts(plans, plan, every, buckets_of(limits.max_batch_tokens))
    kernels = build_kernels(variants, target, progress)
    found = {name: faults_of(variants[name], binary.facts, target) for name, binary in sorted(kernels.items())}
    faults = {name: problems for name, problems in found.items() if problems}
    with Packing(output) as packing, writing(output) as folder:
        recipes = {c.region.name: named_recipes(c) for c in compiled}
        packed = pack_weights(source, quantisation, options, program, recipes, packing, folder / "weights", progress)
        write_plan(folder / "plan", plan, every, plans)
        for name, binary in sorted(kernels.items()):
            write_kernel(folder, name, binary.data, binary.facts, source_of(variants[name].kernel))
        write_graphs(folder / "graph", {c.region.name: c.region.gm for c in compiled} | cutting.graphs)
        copy_model_files(source, folder)
        (folder / "explain.json").write_bytes(encode(explanation | explanation_of(cutting.rows)))
        (folder / "layouts.json").write_bytes(encode(layouts))
        write_report(folder / "report.md", source.name, target, explanation, layouts, plan, regions, ranks)
        manifest = write_manifest(
            folder,
            lambda files: Manifest(
                schema=SCHEMA_VERSION, model=source.name, config_sha256=config_hash(source.config), target=target.name,
                arch=target.arch if target.is_gpu else "",
                dtype=options.dtype, scheme=msgspec.to_builtins(quantisation.scheme), scales=quantisation.how(),
                calibration="" if options.calibration is None else hash_file(options.calibration).sha256,
                with_weights=options.with_weights, limits=limits, serving=serving, tools=tools(),
                passes={c.region.name: [r.fingerprint for r in c.rows] for c in compiled}, recipes=recipes, files=files,
            ),
            {f"weights/{name}": entry for name, entry in packed.files.items()} if packed else None,
        )  # fmt: skip
        check_program(str(output), manifest, plan, every, ranks=plans)
    size = sum(f.stat().st_size for f in output.rglob("*") if f.is_file())
    facts = {name: binary.facts for name, binary in kernels.items()}
    return Result(
        output, artifact_hash(output), source.name, target, explanation, layouts, plan, regions, size, packed,
        calibrated, facts, faults, ranks,
    )  # fmt: skip


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


def check_scheme(options: Options, config: DeepseekV4Config, target: Target) -> Quantisation:
    """The scheme as chosen, with the caches as chosen, or an error that names the flag and what is legal."""
    scheme = get_scheme(options.scheme)
    for flag, value, legal in (
        ("--cache-rows", options.rows, get_args(Rows)),
        ("--index-rows", options.index_rows, get_args(IndexRows)),
        ("--scales", options.scales, get_args(Method)),
    ):
        if value and value not in legal:
            raise CompileError(f"{flag} {value} is unknown; choose one of {', '.join(legal)}.")
    scheme = msgspec.structs.replace(
        scheme, rows=cast(Rows, options.rows or scheme.rows),
        index_rows=cast(IndexRows, options.index_rows or scheme.index_rows),
    )  # fmt: skip
    try:
        rows, query = row_layouts(config, scheme.rows, scheme.index_rows, options.dtype)
    except ValueError as error:
        raise CompileError(f"rows {scheme.rows}, index rows {scheme.index_rows}: {error}.") from error
    check_rules(scheme, config)
    calibration = None if options.calibration is None else Calibration(options.calibration)
    return Quantisation(scheme, target, rows, query, cast(Method, options.scales), calibration)


def check_calibration(compiled: list[Compiled], quantisation: Quantisation) -> tuple[int, int] | None:
    """How many of the tensors rounded here the calibration fits, of how many; None without one. None is an error."""
    if quantisation.calibration is None:
        return None
    found, total = fitted(recipe for c in compiled for recipe in c.ctx.weights.values())
    if not found:
        name = f"--calibration {quantisation.calibration.path}"
        if not total:
            raise CompileError(f"{name} is not needed: scheme {quantisation.scheme.name} rounds no weight.")
        raise CompileError(f"{name} fits none of the {total} kinds of tensors rounded here; it is of another model.")
    return found, total


def check_stop(label: str, target: Target, parallel: tuple[str, ...] = ()) -> None:
    """Whether there is a pass to stop after."""
    if parallel:
        raise CompileError(f"--stop-after {label} leaves nothing to cut for ranks; leave it or --parallel out.")
    labels = [step.label for step in pipelines.compilation(target=target)]
    if label not in labels:
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


def fuse(
    source: ModelSource,
    program: Program,
    region: Region,
    quantisation: Quantisation,
    options: Options,
    progress: Progress,
    keep: bool = False,
) -> Compiled:
    """Run the passes on one region; a miss of a promised match is an error. `keep` it as ranks are cut from."""
    progress(f"passes {region.name}", program.regions.index(region) + 1, len(program.regions))
    prefixes = [c.prefix for c in program.calls if c.region == region.name]
    weights = {i.placeholder: i.name for i in region.inputs if i.role == "weight"}
    recipes = {path: source.recipe(prefixes, path, options.dtype) for path in weights.values()}
    by_path = {path.removesuffix(".weight"): recipe for path, recipe in recipes.items()}
    ctx = Context(
        region.name,
        expected=promised_matches(
            source.config, region.name, rounded(region.name, by_path, quantisation, options.dtype)
        ),
        weights={placeholder: recipes[path] for placeholder, path in weights.items()},
        module_paths=dict(weights),
        states={i.placeholder: i.name for i in region.inputs if i.role == "state"},
        dtype=DTYPES[options.dtype],
        spec_of=lambda recipe: output_spec(instantiate(recipe, prefixes[0]), quantisation.spec_of(source)),
        choice=choice_of(quantisation, prefixes),
    )
    dump = options.dump_ir / region.name if options.dump_ir is not None else None
    first, last = quantisation.pipeline(), pipelines.emission(quantisation.target)
    rows = run_pipeline(first, region.gm, ctx, dump, options.stop_after)
    if rows[-1].label == options.stop_after:
        return Compiled(region, ctx, rows)
    uncut = (copy.deepcopy(region.gm), copy_context(ctx)) if keep else None
    rows += run_pipeline(last, region.gm, ctx, dump, options.stop_after, after=first)
    return Compiled(region, ctx, rows, uncut)


def choice_of(quantisation: Quantisation, prefixes: list[str]) -> Choice:
    """How scales are chosen; with a calibration, by what enters each weight's product in every block that uses it."""
    known = quantisation.calibration
    if known is None:
        return Choice(quantisation.method)
    return Choice("mse", lambda weight: known.importance(prefixes, weight))


def rounded(region: str, recipes: Mapping[str, Recipe], quantisation: Quantisation, dtype: str) -> Rounded:
    """Which products and caches the scheme quantises, for what the model promises; `recipes`: by path in the block."""
    found: dict[tuple[str, ...], str | None] = {}
    for product in products_of(region):
        rule = quantisation.scheme.rule(product.kind, product.paths)
        stored = {stored_layout(recipes[path]) for path in product.paths}
        if rule is not None and rule[1].packs(stored.pop() if len(stored) == 1 else None):
            found[product.paths] = rule[1].activation
    return Rounded(
        found, rows=bool(quantisation.rows.get("window")), index_rows=bool(quantisation.rows.get("index_rows")),
        scaled=quantisation.target.is_gpu, casts=dtype != "float32",
    )  # fmt: skip


def build_kernels(variants: dict[str, Variant], target: Target, progress: Progress) -> dict[str, Binary]:
    """Compile every distinct kernel once, in parallel; what an earlier compile made is taken from the cache."""
    return build_all(variants.values(), target, default_store(), progress=progress) if variants else {}


def link(program: Program, compiled: list[Compiled], regions: dict[str, RegionPlan], serving: Serving) -> ProgramPlan:
    """The program's plan: calls, state, and the memory of values and arenas at the largest step."""
    from atomc.codegen.memory import program_values_bytes

    largest = serving.bounds()
    calls = [CallPlan(c.region, c.prefix, _used(c.binds, regions[c.region])) for c in program.calls]
    changed = {c.region.name: c.ctx.state_specs for c in compiled}
    states = {
        call.prefix: [
            StateTensor(s.name, s.pool, list(shape), dtype)
            for s in program.states[call.prefix]
            for shape, dtype in [changed[call.region].get(s.name, (s.shape, s.dtype))]
        ]
        for call in program.calls
        if call.prefix in program.states
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
    source: ModelSource,
    quantisation: Quantisation,
    options: Options,
    program: Program,
    recipes: dict[str, dict[str, Recipe]],
    packing: Packing,
    folder: Path,
    progress: Progress,
) -> Packed | None:
    """Every recipe of every call, streaming, into safetensors shards; None if the source has no weights."""
    if source.reader is None:
        return None
    calls = [(c.region, c.prefix) for c in program.calls]
    tensors: Source = source.reader
    if quantisation.calibration is not None:
        tensors = CalibratedSource(tensors, quantisation.calibration)
    return packing.pack(tensors, weights_of(calls, recipes, tensors.spec), folder, progress)


def write_plan(folder: Path, plan: ProgramPlan, regions: dict[str, RegionPlan], ranks: list[RanksPlan]) -> None:
    """`plan/program.json`, one file for each region, and the layouts on many ranks, if there are any."""
    folder.mkdir()
    if ranks:
        (folder / RANKS_FILE).write_bytes(encode(ranks))
    (folder / "program.json").write_bytes(encode(plan))
    for name, region in regions.items():
        (folder / f"{name}.json").write_bytes(encode(region))


def write_graphs(folder: Path, graphs: Mapping[str, GraphModule]) -> None:
    """The final graph of each region, readable, with source paths relative to the package."""
    from atomc.passes.graph import readable

    folder.mkdir()
    root = re.escape(str(Path(atomc.__file__).parent.parent)) + "/"
    for name, gm in graphs.items():
        text = re.sub(root, "", readable(gm))
        (folder / f"{name}.py").write_text(text, encoding="utf-8")


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
