"""The job that every rank of a run receives, the rank's place in the layout, and its report.

May import nothing else of `runtime`.
"""
