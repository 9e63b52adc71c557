"""NVIDIA H100 SXM5 80GB (Hopper, sm_90).

Sources: NVIDIA H100 datasheet and Hopper architecture white paper (132 SMs; dense bf16 989.4 and FP8 1,978.9 TFLOP/s;
HBM3 80 GB at 3.35 TB/s; NVLink 4, 900 GB/s both ways through NVSwitch); CUDA C++ programming guide, compute capability
9.0 (227 KiB of shared memory a block, 64 K registers an SM, 255 a thread). No FP4 instruction: Triton expands
`dot_scaled` to bf16, hence mx "emulated". Memory is counted in 10^9 bytes, slightly below what the driver reports.
Residency: the same guide and the occupancy calculator (228 KiB of shared memory an SM, 1 KiB of it kept for each block,
64 warps, 32 blocks, registers given to a warp by 256). float32 outside the matrix units: 66.9 TFLOP/s (white paper).
Links: reduce-scatter reaches 360 GB/s and all-gather 350 of 450 (nccl-tests, reported in NVIDIA/nccl#1281); 15
microseconds for the least collective, assumed. Least all-reduces of two devices took 30 to 98 microseconds, but were
launched one by one: torch's host time is in them, which a captured graph has not, so that they are not used.

Contention, from two H100 of one node under bfloat16 products of V4-Flash (benchmarks/results/overlap_nccl_h100.json):
collectives of NCCL 2.28 kept 0.18 to 0.52 of their speed beside products, 0.34 on average (`kept`), products 0.81 to
1.05 of theirs beside collectives, 0.95 on average (`units`), copies 0.76 to 0.93 (`copies` makes it 0.85); products one
after the other without a pause took 1.01 to 1.11 of what short runs of them took, 1.06 in the middle (`burst`). The
power of a collective, 0.3, was not measured: with it and `kept` the twelve captured chains are predicted to 3 %. That a
kernel bound by memory takes 0.7 of the power, and that the compute stream idles for 25 microseconds where the host
waits, is assumed. Collectives of two devices reach 95 to 240 GB/s in messages of 17 to 134 MB, less than the share
above, which is of long ones of eight.

Sustained, from one run on one H100 80GB HBM3: copy 3.0 TB/s, bf16 8192^3 730 to 800 TFLOP/s, FP8 1,238 TFLOP/s
(cuBLASLt), and some 4 microseconds of ramp and tail a kernel of a captured graph. Another run copied at 2.42 TB/s and
reached FP8 1,485 TFLOP/s; docs/inspect.md compares predictions at both rates with what was measured.
"""

from atomc.targets.target import KIB, Link, Peaks, Product, Residency, Sustained, Target, TritonBackend

TARGET = Target(
    name="h100",
    product="NVIDIA H100 SXM5 80GB",
    vendor="nvidia",
    arch="sm_90",
    triton=TritonBackend("cuda", 90, 32),
    fp8="ocp",
    mx="emulated",
    compute_units=132,
    wavefront=32,
    shared_bytes=227 * KIB,
    register_file_bytes=256 * KIB,
    registers_per_lane=255,
    peaks=Peaks(bf16=9.894e14, fp8=1.9789e15, fp4=None, vector=6.69e13),
    memory_bytes=80_000_000_000,
    memory_rate=3.35e12,
    link=Link(
        topology="switch",
        rate=450.0e9,
        devices=8,
        share=0.79,
        latency=15.0e-6,
        origin="reported",
        units=0.05,
        copies=3.6,
        kept=0.35,
        power=0.3,
        contention="measured",
    ),
    residency=Residency(
        shared_bytes=228 * KIB,
        shared_granule=128,
        shared_reserved=KIB,
        partitions=4,
        register_granule=8,
        wavefronts=64,
        workgroups=32,
        barriers=32,
    ),
    sustained=Sustained(
        memory=0.89,
        matrix=(0.77, 0.62),
        launch=4.0e-6,
        origin="measured",
        burst=1.06,
        memory_power=0.7,
        host=25.0e-6,
        products=(Product("attention", 0.65, "reported", "FlashMLA: sparse prefill, 640 TFLOP/s on an H800"),),
    ),
    dependent_launch=True,
)
