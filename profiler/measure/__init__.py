"""What is measured, in which order and how: points of a grid, their sampling on all ranks, the whole profile.

May import all of `profiler`.
"""
