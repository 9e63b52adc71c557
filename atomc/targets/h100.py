"""NVIDIA H100 SXM5 80GB (Hopper, sm_90).

Sources: NVIDIA H100 datasheet and Hopper architecture white paper (132 SMs; dense bf16 989.4 and FP8 1,978.9 TFLOP/s;
HBM3 80 GB at 3.35 TB/s; NVLink 4, 900 GB/s both ways through NVSwitch); CUDA C++ programming guide, compute capability
9.0 (227 KiB of shared memory a block, 64 K registers an SM, 255 a thread). No FP4 instruction: Triton expands
`dot_scaled` to bf16, hence mx "emulated". Memory is counted in 10^9 bytes, slightly below what the driver reports.
"""

from atomc.targets.target import KIB, Link, Peaks, Target, TritonBackend

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
    peaks=Peaks(bf16=9.894e14, fp8=1.9789e15, fp4=None),
    memory_bytes=80_000_000_000,
    memory_rate=3.35e12,
    link=Link(topology="switch", rate=450.0e9, devices=8),
    dependent_launch=True,
)
