"""Plan and cost model files, layouts, and the memory that a plan needs.

May import nothing else of `tuner`.
"""
