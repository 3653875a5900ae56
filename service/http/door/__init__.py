"""What every request passes: who may call what, and the limits of a call."""
