"""The rules that make rounds, one file each: the field's baselines as their sources do them, and ours.

Every rule is a function of a Problem that returns rounds; `tuner.search.planner` names, times and compares them.
"""
