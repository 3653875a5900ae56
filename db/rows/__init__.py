"""What is kept, a module for each kind of row: hardware, measurements, plans, runs, fits, processes;
and archives of them.

May import `db.store` and `db.files.replacement`.
"""
