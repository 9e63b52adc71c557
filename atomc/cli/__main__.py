"""`python -m atomc.cli`: the program where it is not installed."""

from atomc.cli import main

main()
