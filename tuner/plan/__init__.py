"""What is planned and written down: plan and cost model files, layouts, and the memory that a plan takes.

May import nothing else of `tuner`.
"""
