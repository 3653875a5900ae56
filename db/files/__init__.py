"""Files of users: JSON, CSV and text read within limits, files replaced atomically, and numbers in options.

May import `db.errors`.
"""
