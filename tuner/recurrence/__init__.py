"""When rounds run: the exact recurrence that judges every plan, for stages of one group of layers and of several.

May import `tuner.plan`.
"""
