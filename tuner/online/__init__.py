"""One round after another while requests arrive.

May import `tuner.rounds`, `tuner.policies` and `tuner.plan.plan`.
"""
