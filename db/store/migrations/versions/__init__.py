"""One file a revision, oldest first: the number is the name."""
