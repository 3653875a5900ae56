"""Layers that are run as wholes: their costs from rows of whole layers, a curve for each kind."""
