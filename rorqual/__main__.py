"""`python -m rorqual` is the command line."""

from rorqual.cli.main import main

if __name__ == "__main__":
    main()
