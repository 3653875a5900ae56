"""What every rank of a run is told, where it stands, and what it reports.

May import nothing else of `runtime`.
"""
