"""Code generation: from a scheduled graph to a plan of steps, and from an op family to a binary per target.

The only room that may import Triton. What it writes is binaries and plain data: the runtime that serves them needs none
of it.
"""
