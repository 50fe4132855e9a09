"""`python -m slimdown` is the command line."""

from slimdown.cli import main

main()
