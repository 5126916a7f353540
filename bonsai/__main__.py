"""`python -m bonsai`: the command without its script."""

from bonsai.cli import main

if __name__ == "__main__":
    main()
