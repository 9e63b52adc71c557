"""What a target is: the facts of one kind of device that passes, kernels and cost formulas may rely on.

Facts are data. Nothing here asks a device: an artifact for an MI355X is compiled, sized and predicted on a laptop.

Terms: a *compute unit* is AMD's CU or NVIDIA's SM; a *wavefront* is AMD's wave or NVIDIA's warp; *shared memory* is
AMD's LDS. Peaks are dense (no structured sparsity), at the highest clock the vendor lists. Links are counted in one
direction. All sizes are bytes, all rates are per second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

KIB = 1024
GIB = 1024**3

Vendor = Literal["none", "amd", "nvidia"]
Fp8Dialect = Literal["ocp", "fnuz"]
MxSupport = Literal["native", "emulated", "none"]
Topology = Literal["none", "mesh", "switch"]
Format = Literal["bf16", "fp8", "fp4"]
Origin = Literal["measured", "reported", "assumed"]


@dataclass(frozen=True, slots=True)
class TritonBackend:
    """The triple that Triton compiles for: `GPUTarget(backend, arch, warp_size)`."""

    backend: Literal["hip", "cuda"]
    arch: str | int
    warp_size: Literal[32, 64]


@dataclass(frozen=True, slots=True)
class Peaks:
    """Dense matrix throughput in FLOP/s by operand format; None where no matrix instruction takes the format.

    `vector`: float32 throughput outside the matrix units.
    """

    bf16: float
    fp8: float | None
    fp4: float | None
    vector: float


@dataclass(frozen=True, slots=True)
class Residency:
    """What one compute unit holds at a time, for occupancy.

    Attributes:
        shared_bytes: its shared memory (LDS), all workgroups together. shared_granule: bytes it is given out in.
            shared_reserved: bytes that the system takes of it for each workgroup.
        partitions: SIMDs (AMD) or sub-partitions (NVIDIA), each with an equal part of the registers.
        register_granule: registers of a lane are given out in multiples of it.
        wavefronts, workgroups: most of them. barriers: most workgroups of more than one wavefront.
    """

    shared_bytes: int
    shared_granule: int
    shared_reserved: int
    partitions: int
    register_granule: int
    wavefronts: int
    workgroups: int
    barriers: int


@dataclass(frozen=True, slots=True)
class Product:
    """What one kind of product sustains on a target, where that is known to differ from plain ones.

    Attributes:
        kind: `linear` (narrow codes with scales of blocks), `grouped` (the same for each group of heads), `experts`
            (narrow codes, rows of many experts), `attention` (over the rows that each token chose).
        share: of the matrix peak of the operands' format, `attention` of bf16's. origin, source: where it is from.
    """

    kind: Literal["linear", "grouped", "experts", "attention"]
    share: float
    origin: Origin
    source: str


@dataclass(frozen=True, slots=True)
class Sustained:
    """What predictions reckon with instead of the peaks.

    Attributes:
        memory: share of `memory_rate` that a long kernel reaches. matrix: share of the matrix peaks, for bf16 and for
            narrower operands. launch: seconds that a launch in a captured graph takes at the least.
        origin: `measured` on a device of this kind, or `assumed` to be as on another.
        products: what plans reckon with instead of `matrix` (`Target.product_rate`).
        burst: speed of products, over the sustained one, while the device is not held to its power: a long run of them
            is. memory_power: share of the power that a kernel bound by memory takes; assumed everywhere.
        host: seconds that the compute stream idles after a kernel whose result the host waits for, until the next one
            that it launches runs; assumed everywhere.
    """

    memory: float
    matrix: tuple[float, float]
    launch: float
    origin: Literal["measured", "assumed"]
    products: tuple[Product, ...] = ()
    burst: float = 1.0
    memory_power: float = 0.0
    host: float = 0.0


@dataclass(frozen=True, slots=True)
class Link:
    """How the devices of one node reach one another.

    Attributes:
        topology: `switch`: one pair alone may use the whole rate; `mesh`: a pair has `rate / (devices - 1)`.
        rate: bytes per second out of one device to all its peers together, one direction.
        devices: devices of one node that are connected this way, itself included.
        share: part of the rate that a long collective reaches. latency: seconds that a collective takes at the least.
        origin: where share is from: `reported` in public for a device of this kind, or `assumed` to be as on another.
            Latencies are assumed everywhere.
        units: share of the compute units that a collective takes from compute. copies: bytes between a device and its
            memory for each byte that it sends. kept: share of its rate that a collective keeps while compute runs: it
            waits for units, and shares them. power: share of the device's power that it takes. By default nothing is
            taken and all is kept.
        contention: where `units`, `copies` and `kept` are from, and `Sustained.burst`; `power` is what fits them.
    """

    topology: Topology
    rate: float
    devices: int
    share: float = 1.0
    latency: float = 0.0
    origin: Literal["reported", "assumed"] = "assumed"
    units: float = 0.0
    copies: float = 0.0
    kept: float = 1.0
    power: float = 0.0
    contention: Origin = "assumed"

    @property
    def pair_rate(self) -> float:
        """Bytes per second from one device to one peer."""
        return self.rate / (self.devices - 1) if self.topology == "mesh" else self.rate


@dataclass(frozen=True, slots=True)
class Target:
    """One kind of device.

    Attributes:
        name: what `--target` takes.
        product: the vendor's name, for reports.
        vendor: who made it; `none` for the embedded cpu target.
        arch: instruction set, as the assembler calls it (`gfx950`, `sm_90`).
        triton: what Triton compiles for; None where no kernel is generated (cpu runs the references).
        fp8: `ocp` (e4m3fn, largest 448) or `fnuz` (e4m3fnuz, largest 240): bytes of one read as the other are wrong.
        mx: scaled FP8/FP4 products (one E8M0 scale per 32 values): `native` instructions, `emulated` by expansion to a
            wider format, or `none` when the kernel compiler cannot lower them.
        compute_units: CUs or SMs.
        wavefront: lanes that run in lockstep; 1 on the cpu.
        shared_bytes: shared memory (LDS) that one workgroup may take.
        register_file_bytes: vector registers of one compute unit.
        registers_per_lane: most 32-bit registers of one lane (AMD: VGPRs and AGPRs together).
        peaks: matrix throughput.
        memory_bytes: capacity of the device memory as listed; what a process may take is a few percent less.
        memory_rate: peak bandwidth of the device memory.
        link: the connection inside a node.
        residency: what a compute unit holds; None on the cpu. sustained: what predictions reckon with.
        dependent_launch: a kernel may be launched before the one before it ends, and wait for it itself (NVIDIA from
            sm_90: programmatic dependent launch).
    """

    name: str
    product: str
    vendor: Vendor
    arch: str
    triton: TritonBackend | None
    fp8: Fp8Dialect
    mx: MxSupport
    compute_units: int
    wavefront: int
    shared_bytes: int
    register_file_bytes: int
    registers_per_lane: int
    peaks: Peaks
    memory_bytes: int
    memory_rate: float
    link: Link
    residency: Residency | None
    sustained: Sustained
    dependent_launch: bool = False

    def peak(self, operands: Format) -> float:
        """Dense FLOP/s of a product whose operands are stored as `operands`.

        A format without an instruction counts at the rate of the next wider one that has it: that is what a kernel does
        (each e2m1 value is an e4m3 value, each e4m3 value a bf16 value, so the expansion is exact).
        """
        wider: dict[Format, tuple[float | None, ...]] = {
            "fp4": (self.peaks.fp4, self.peaks.fp8),
            "fp8": (self.peaks.fp8,),
            "bf16": (),
        }
        return next((rate for rate in wider[operands] if rate is not None), self.peaks.bf16)

    def sustained_matrix(self, operands: Format) -> float:
        """FLOP/s of products of `operands` that predictions reckon with."""
        return self.peak(operands) * self.sustained.matrix[operands != "bf16"]

    def product_rate(self, kind: str, operands: Format) -> float:
        """FLOP/s of one kind of product (`Product.kind`) that plans reckon with; of any other `sustained_matrix`."""
        known = next((product for product in self.sustained.products if product.kind == kind), None)
        return self.sustained_matrix(operands) if known is None else self.peak(operands) * known.share

    @property
    def is_gpu(self) -> bool:
        """Whether kernels are generated for it."""
        return self.triton is not None
