"""The points to measure, their order, and the choice of kernels from their rows.

May import `profiler.model` and `profiler.kernels`.
"""
