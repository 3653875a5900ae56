"""Processes of ranks: started, joined, watched and ended.

May import nothing else of `profiler`.
"""
