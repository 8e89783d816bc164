"""`python -m pageferry` is the command line."""

from .tools.cli.main import main

if __name__ == "__main__":
    main()
