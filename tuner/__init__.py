"""What is decided: the cost model, the rounds, the layout and the plan."""
