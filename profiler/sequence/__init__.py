"""How the tokens of a round are shared out among the ranks of a sequence-parallel group.

May import nothing else of `profiler`.
"""
