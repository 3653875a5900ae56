"""`python -m service` is the command `isochunk`."""

from service.cli.main import main

main()
