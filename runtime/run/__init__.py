"""A run from a plan to its result: checks, ranks, the pipeline's rounds on a clock, tokens, and the trace.

May import all of `runtime`.
"""
