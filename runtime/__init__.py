"""What is executed: ranks, stages, shards and the rounds of a plan."""
