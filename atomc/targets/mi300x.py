"""AMD Instinct MI300X (CDNA 3, gfx942).

Sources: ROCm documentation, "AMD GPU specifications" (304 CUs, wavefront 64, LDS 64 KiB, VGPR file 512 KiB, 192 GiB);
AMD MI300X datasheet (bf16 1,307.4 and FP8 2,614.9 TFLOP/s at 2.1 GHz, HBM3 5.3 TB/s, seven Infinity Fabric links of
128 GB/s both ways, each to one peer). Its FP8 is the fnuz dialect and it has no FP4 instruction; Triton 3.7 cannot
lower `dot_scaled` for it, hence mx "none". Registers per lane: CDNA 3 ISA, 256 VGPRs + 256 AGPRs.
Residency: LLVM, "User Guide for AMDGPU Backend" and the occupancy arithmetic of its GCN subtarget (four SIMDs a CU,
eight waves a SIMD, VGPRs by 8, LDS by 512 bytes, 16 workgroups of more than one wave). float32 outside the matrix
units: 163.4 TFLOP/s (datasheet). Links: of 64 GB/s some 48 are usable (ROCm blog "Understanding RCCL Bandwidth and
xGMI Performance on AMD Instinct MI300X", 2025-03-02); 15 microseconds for the least collective, assumed. Sustained
and contention: as measured on an H100, assumed; nothing was measured on this device.
"""

from dataclasses import replace

from atomc.targets.h100 import TARGET as H100
from atomc.targets.target import GIB, KIB, Peaks, Residency, Target, TritonBackend

TARGET = Target(
    name="mi300x",
    product="AMD Instinct MI300X",
    vendor="amd",
    arch="gfx942",
    triton=TritonBackend("hip", "gfx942", 64),
    fp8="fnuz",
    mx="none",
    compute_units=304,
    wavefront=64,
    shared_bytes=64 * KIB,
    register_file_bytes=512 * KIB,
    registers_per_lane=512,
    peaks=Peaks(bf16=1.3074e15, fp8=2.6149e15, fp4=None, vector=1.634e14),
    memory_bytes=192 * GIB,
    memory_rate=5.3e12,
    link=replace(H100.link, topology="mesh", rate=7 * 64.0e9, share=0.75, origin="reported", contention="assumed"),
    residency=Residency(
        shared_bytes=64 * KIB,
        shared_granule=512,
        shared_reserved=0,
        partitions=4,
        register_granule=8,
        wavefronts=32,
        workgroups=32,
        barriers=16,
    ),
    sustained=replace(H100.sustained, origin="assumed", products=()),
)
