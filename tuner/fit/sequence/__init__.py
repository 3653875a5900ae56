"""What each way of sharing a round's rows costs a rank in one layer: a module a kind, over parts that are measured."""
