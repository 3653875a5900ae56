"""Traces of requests that arrive over time, run under policies in simulated time.

May import `tuner.online`, `tuner.policies` and what they may.
"""
