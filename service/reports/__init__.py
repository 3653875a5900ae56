"""Reports of plans, runs and hardware: one HTML file each with its pictures in it.

May import all but the doors.
"""
