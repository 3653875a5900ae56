"""The planner service: the HTTP API, the page, and what both are guarded by.

May import all of `service` but the command line.
"""
