"""One round after another while requests arrive, and replays of a trace under any policy.

May import `tuner.rounds`, `tuner.policies` and `tuner.plan.plan`.
"""
