"""Commands that make a checkpoint of another: `quantize`, `prune`, `train`."""
