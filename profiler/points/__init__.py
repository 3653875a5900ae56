"""Which points are measured and in which order, and what their rows say about kernels.

May import `profiler.model` and `profiler.kernels`.
"""
