"""What the commands do that make a checkpoint of another: quantize, prune, train."""
