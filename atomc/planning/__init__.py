"""Planning: which layout a model and a workload want, and what two-batch overlap gains, from formulas. No capture."""
