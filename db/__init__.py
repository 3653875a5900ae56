"""What is kept: tables, migrations, sessions and the rows of measurements, plans and runs.

Imports none of the other folders.
"""
