"""NVIDIA B200 in HGX and DGX systems (Blackwell, sm_100).

Sources: NVIDIA Blackwell architecture brief, HGX B200 at 1,000 W (dense bf16 2.25, FP8 4.5, FP4 9 PFLOP/s); HGX B200
datasheet (float32 600 TFLOP/s of eight GPUs); DGX B200 datasheet (eight GPUs with 1,440 GB and 64 TB/s together; NVLink
5, 1.8 TB/s both ways through NVSwitch); 148 SMs as the driver reports; CUDA C++ programming guide, compute capability
10.0 (227 KiB of shared memory a block and 228 an SM, 64 K registers an SM, 255 a thread, 64 warps, 32 blocks). The
links' share is the one reported for an H100, assumed, as are 15 microseconds for the least collective. The
accumulators' tensor memory (256 KiB an SM) is the kernel compiler's affair and not listed. Sustained and
contention: as measured on an H100, assumed; nothing was measured on this device.
"""

from dataclasses import replace

from atomc.targets.h100 import TARGET as H100
from atomc.targets.target import KIB, Peaks, Product, Residency, Target, TritonBackend

TARGET = Target(
    name="b200",
    product="NVIDIA B200",
    vendor="nvidia",
    arch="sm_100",
    triton=TritonBackend("cuda", 100, 32),
    fp8="ocp",
    mx="native",
    compute_units=148,
    wavefront=32,
    shared_bytes=227 * KIB,
    register_file_bytes=256 * KIB,
    registers_per_lane=255,
    peaks=Peaks(bf16=2.25e15, fp8=4.5e15, fp4=9.0e15, vector=7.5e13),
    memory_bytes=180_000_000_000,
    memory_rate=8.0e12,
    link=replace(H100.link, rate=900.0e9, origin="assumed", contention="assumed"),
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
    sustained=replace(
        H100.sustained,
        origin="assumed",
        products=(
            Product("experts", 0.54, "reported", "DeepGEMM MegaMoE, V4-Pro on eight ranks: 2,438 TFLOP/s at 32,768"),
            Product("attention", 0.64, "reported", "FlashMLA: sparse prefill, 1,450 TFLOP/s"),
        ),
    ),
    dependent_launch=True,
)
