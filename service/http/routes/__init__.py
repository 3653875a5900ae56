"""The routes, a module for each kind of thing; each route says which scope its callers need."""
