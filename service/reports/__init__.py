"""Reports of plans, runs and hardware: one HTML file each with its pictures in it.

May import all of `service` but `jobs`, `http` and `cli`.
"""
