"""The recurrence that judges rounds, lower bounds that hold for any rounds, and the packing of chunks into rounds.

May import `tuner.plan.plan`.
"""
