"""Checkpoints read slice by slice, and the shard of a model that one rank holds.

May import `runtime.stage.stage.place`.
"""
