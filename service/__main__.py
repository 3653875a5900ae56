"""`python -m service` is the command `isochunk`."""

from service.cli import main

main()
