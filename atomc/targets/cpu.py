"""cpu: the embedded default. It runs the references of the ops with PyTorch; no kernel is generated.

Not one device but any, so the figures are nominal, those of two server cores with AVX2 at 3 GHz: 2 cores x 3e9 clocks x
2 FMA units x 8 lanes x 2 FLOP = 1.9e11 FLOP/s in float32, which is what bf16 computes in; one DDR4 channel, 2e10 B/s.
They rank steps of a plan; they are no promise of a time. Narrow formats are computed as float32, so they have no peak.
"""

from atomc.targets.target import GIB, Link, Peaks, Sustained, Target

TARGET = Target(
    name="cpu",
    product="any CPU that PyTorch runs on",
    vendor="none",
    arch="any",
    triton=None,
    fp8="ocp",
    mx="emulated",
    compute_units=2,
    wavefront=1,
    shared_bytes=0,
    register_file_bytes=0,
    registers_per_lane=0,
    peaks=Peaks(bf16=1.9e11, fp8=None, fp4=None, vector=1.9e11),
    memory_bytes=8 * GIB,
    memory_rate=2.0e10,
    link=Link(topology="none", rate=0.0, devices=1),
    residency=None,
    sustained=Sustained(memory=1.0, matrix=(1.0, 1.0), launch=1.0e-5, origin="assumed"),
)
