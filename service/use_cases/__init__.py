"""What every door calls: tune, run a plan, list what is kept.

May import all but the doors.
"""
