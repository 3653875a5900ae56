"""Files that users hand over or take away: the one door for JSON, whole replacements, and numbers in options.

May import `db.errors`.
"""
