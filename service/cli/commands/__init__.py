"""One file a command of `isochunk`; heavy imports stay inside the functions, so that `--help` answers at once."""
