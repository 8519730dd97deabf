"""`python -m edgegen` is `edgegen`."""

from edgegen.cli import main

main()
