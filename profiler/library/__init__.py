"""Decoders of the installed Transformers: found by a configuration, built on the meta device, run layer by layer.

Their modules are unmodified. This room knows no architecture's name: the library's own tables do.
"""
