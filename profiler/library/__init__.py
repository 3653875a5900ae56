"""Decoders of the installed Transformers: found by a configuration, built on the meta device.

This room knows no architecture's name: the library's own tables do.
"""
