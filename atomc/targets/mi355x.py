"""AMD Instinct MI355X (CDNA 4, gfx950).

Sources: ROCm documentation, "AMD GPU specifications" (256 CUs, wavefront 64, LDS 160 KiB, VGPR file 512 KiB, 288 GiB);
AMD CDNA 4 white paper and MI355X datasheet for clock (2.4 GHz), matrix FLOPs per clock and CU (bf16 4,096, OCP FP8
8,192, MXFP4 16,384: 2.5, 5.0, 10.1 PFLOP/s), memory (HBM3E, 8 TB/s) and Infinity Fabric (seven links of 153.6 GB/s both
ways, each to one peer). Registers per lane: CDNA 4 ISA, 256 VGPRs + 256 AGPRs.
Residency: LLVM, "User Guide for AMDGPU Backend" and the occupancy arithmetic of its GCN subtarget (four SIMDs a CU,
eight waves a SIMD, VGPRs by 8, LDS by 1,280 bytes, 16 workgroups of more than one wave). float32 outside the matrix
units: 157.3 TFLOP/s (datasheet). Links: the share that AMD reports for an MI300X, assumed, and 15 microseconds for the
least collective, assumed. Sustained and contention: as measured on an H100, assumed; nothing was measured on
this device.
"""

from dataclasses import replace

from atomc.targets.h100 import TARGET as H100
from atomc.targets.target import (
    GIB,
    KIB,
    Peaks,
    Product,
    Residency,
    Target,
    TritonBackend,
)

TARGET = Target(
    name="mi355x",
    product="AMD Instinct MI355X",
    vendor="amd",
    arch="gfx950",
    triton=TritonBackend("hip", "gfx950", 64),
    fp8="ocp",
    mx="native",
    compute_units=256,
    wavefront=64,
    shared_bytes=160 * KIB,
    register_file_bytes=512 * KIB,
    registers_per_lane=512,
    peaks=Peaks(bf16=2.5166e15, fp8=5.0332e15, fp4=10.0663e15, vector=1.573e14),
    memory_bytes=288 * GIB,
    memory_rate=8.0e12,
    link=replace(H100.link, topology="mesh", rate=7 * 76.8e9, share=0.75, origin="assumed", contention="assumed"),
    residency=Residency(
        shared_bytes=160 * KIB,
        shared_granule=1280,
        shared_reserved=0,
        partitions=4,
        register_granule=8,
        wavefronts=32,
        workgroups=32,
        barriers=16,
    ),
    sustained=replace(
        H100.sustained,
        origin="assumed",
        products=(
            Product(
                "linear", 0.46, "reported", "AITER tuned tables: 16384x7168x16384 in 128x128 blocks, 2,340 TFLOP/s"
            ),
            Product("grouped", 0.43, "reported", "AITER tuned tables: batched, scales of 32, 2,177 TFLOP/s"),
            Product("experts", 0.33, "reported", "AITER dsv4_fp8fp4_tuned_fmoe.csv: 1,546 to 1,688 TFLOP/s at 32,768"),
            Product("attention", 0.60, "assumed", "as its bf16 products, 1,519 TFLOP/s in AITER's tuned tables"),
        ),
    ),
)
