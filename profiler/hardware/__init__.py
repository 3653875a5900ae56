"""The devices of this machine, and their published figures.

May import nothing else of `profiler`.
"""
