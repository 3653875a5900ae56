"""The database: where it is, its tables and their migrations, sessions, leases, and errors that a user can act on.

May import `db.errors` and `db.files.replacement`.
"""
