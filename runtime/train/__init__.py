"""Training over chunked rounds: forward with KV kept, backward in reverse, mixed precision, resumable checkpoints."""
