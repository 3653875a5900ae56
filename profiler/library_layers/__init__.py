"""Layers of the installed Transformers that run here: parts of a model with a cache for each request, timed and run.

Their modules are unmodified; attention under the plain causal mask goes through the kernels of this project.
"""
