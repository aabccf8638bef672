"""`python -m extproc`: the command `tollgate`, by the interpreter that runs it."""

from extproc.cli import main

main()
