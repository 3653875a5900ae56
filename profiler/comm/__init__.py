"""How ranks are started, watched and ended, where each stands, and how they exchange data.

May import `db` and the rest of `profiler`; nothing in it depends on models, plans or measurements.
"""
