"""NVIDIA H200 SXM 141GB (Hopper, sm_90): an H100 with more and faster memory.

Source: NVIDIA H200 datasheet (HBM3e 141 GB at 4.8 TB/s; compute and NVLink as the H100 SXM5). Sustained and contention:
as measured on an H100, assumed; the links' share is the one reported for an H100, whose links these are.
"""

from dataclasses import replace

from atomc.targets.h100 import TARGET as H100

TARGET = replace(
    H100,
    name="h200",
    product="NVIDIA H200 SXM 141GB",
    memory_bytes=141_000_000_000,
    memory_rate=4.8e12,
    link=replace(H100.link, contention="assumed"),
    sustained=replace(H100.sustained, origin="assumed"),
)
