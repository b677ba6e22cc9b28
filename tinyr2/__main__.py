"""`python -m tinyr2`: the same as `tinyr2`."""

from tinyr2.cli import main

if __name__ == "__main__":  # child processes import this file too
    main()
