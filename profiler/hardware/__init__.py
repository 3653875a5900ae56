"""What machine this is, and what its vendor publishes of it.

May import nothing else of `profiler`.
"""
