"""The kernel families: one Triton source each, and host functions that launch them (`atomc.codegen.hosts`)."""
