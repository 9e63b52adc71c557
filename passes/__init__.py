"""The passes: each rewrites the FX graph of one region and reports what it matched and what it refused, and why.

One file per pass. Only the runner checks, re-propagates, times, dumps and fingerprints; a pipeline is a tuple of passes
that reads top to bottom. Passes know ops and targets; they know no kernel language, no artifact and no runtime.
"""
