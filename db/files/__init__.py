"""Files that users hand over or take away: the one door for JSON, numbers in options, and archives of measurements.

May import `db.errors`; archives also the rest of `db`.
"""
