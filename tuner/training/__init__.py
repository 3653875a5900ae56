"""Training steps: the order of their rounds forward and backward, their memory and their time, and which is best."""
