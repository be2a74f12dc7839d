"""`python -m lopa.cli`: the command without its script."""

from lopa.cli import main

main()
