"""Plans as other engines take them: flags, environment, files, and what each of them cannot express.

May import `service.use_cases`. What runs inside an engine imports nothing of `service` but its own module.
"""
