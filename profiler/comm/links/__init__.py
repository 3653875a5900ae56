"""Where each rank stands, its groups, and how hidden states go from stage to stage.

May import `profiler.hardware`.
"""
