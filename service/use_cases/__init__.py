"""Use cases called by the command line and the HTTP API: tune, run a plan, list stored rows.

May import all of `service` but `jobs`, `http` and `cli`.
"""
