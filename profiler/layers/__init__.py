"""A decoder layer and the model's ends over packed tokens, and the inputs of a round and of a decode step.

May import `profiler.kernels` and what that may.
"""
