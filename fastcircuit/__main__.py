"""`python -m fastcircuit` is the command line."""

from fastcircuit.cli import main

main()
