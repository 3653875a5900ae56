"""From a chip's peak to the makespan: what each step of the way costs, as predicted and as measured, and what would
move it.
"""
