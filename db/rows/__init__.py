"""Reads and writes rows, a module for each kind: hardware, measurements, plans, runs, fits, processes;
and archives of them.

May import `db.store` and `db.files.replacement`.
"""
