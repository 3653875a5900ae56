"""The requests that are planned: lengths from the command line, and traces in the formats in which they are published.

A trace becomes a `Workload`: requests in order of arrival, what of each prompt is cached, and notes on how it was read.
"""
