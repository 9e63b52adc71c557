"""The command line: one module for each command, `main` as the entry point. Nothing heavy is imported here."""

import os

from atomc.cli.app import main

__all__ = ["main"]

# A step of a small model is hundreds of operators of some ten microseconds. OpenMP's threads spin between them, and on
# a machine with other work each spin holds up the rest: 10 tokens/s were seen where sleeping threads give 58. It must
# be set before torch is imported; a user's own choice stands.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
