"""What is measured: model shapes, the kernels that run them, and the collectives between ranks."""
