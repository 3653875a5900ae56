"""Architectures that kernels here run: a function for each, and in the table of its family a small model to check it.

One more is an entry in this folder: the layer that its configuration describes, and sizes of a model small enough to
be held against Transformers, token by token, by the tests.
"""
