"""Exports plans to other engines: flags, environment, files, and what each engine cannot express.

May import `service.use_cases`. What runs inside an engine imports nothing of `service` but its own module.
"""
