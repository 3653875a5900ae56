"""Plans by name of policy, and the search over layouts, partitions and measured runs.

May import all of `tuner`.
"""
