"""Sizes of a rank's graph and plan beside those of one rank's, by the names of their symbols."""

from typing import Final

AGREED: Final = "P"  # rows of a message, at least every rank's tokens: all ranks agree on it before a step
INDEX: Final = {"dp": "dp_index", "tp": "tp_index"}  # a rank's index on each axis
COUNTED: Final = "X"  # X0, X1, ...: numbers of rows that only running tells
