"""When requests end at best: on one machine, the k-th of a batch, round by round; and so the least mean TTFT."""
