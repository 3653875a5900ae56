"""Measures the points of a grid: sampling on all ranks, and the whole profile.

May import all of `profiler`.
"""
