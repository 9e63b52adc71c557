"""The runtime: loads an artifact and serves it.

It never compiles. It imports neither models, passes, codegen, Triton, sympy nor networkx, and a test holds it to that.
"""
