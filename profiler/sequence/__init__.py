"""Sequence parallelism: how a round's tokens and heads are divided among the ranks of a group.

May import nothing else of `profiler`.
"""
