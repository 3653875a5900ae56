"""Layers known as wholes, by their tensors: described by the modules of Transformers, or by a configuration alone."""
