"""What is kept: tables, migrations, sessions and the rows of measurements, plans and runs.

Knows nothing of the other folders.
"""
