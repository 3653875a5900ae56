"""Work that is timed: a layer's operators, whole layers, collectives, and both side by side, ready to be called."""
