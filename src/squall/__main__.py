"""`python -m squall` is the command `squall`."""

from squall.cli import main

if __name__ == "__main__":
    main()
