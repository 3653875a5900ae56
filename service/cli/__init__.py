"""The command line: commands, options, tables.

May import `service.use_cases`.
"""
