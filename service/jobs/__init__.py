"""Jobs: commands that are queued, run by workers as processes of their own, and survive the end of either.

May import `service.use_cases`.
"""
