"""Checkpoints made smaller by whole units: what each adds, what each costs here, which go, and what is written."""
