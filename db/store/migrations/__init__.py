"""Steps from each revision of the tables to the next, run by alembic when a database is opened.

To change a table: change `db/store/tables.py`, write `versions/000N_what.py`, append its number to
`db.store.schema.REVISIONS`.
The tests compare what the steps lead to with the models, on SQLite and on PostgreSQL.
"""
