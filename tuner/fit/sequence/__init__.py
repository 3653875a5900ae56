"""Costs of each kind of sequence parallelism in one layer, a module a kind, from measured parts."""
