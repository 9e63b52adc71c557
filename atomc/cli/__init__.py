"""The command line: one module for each command, `main` as the entry point. Nothing heavy is imported here."""

from atomc.cli.app import main

__all__ = ["main"]
