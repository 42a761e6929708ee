"""`python -m hookctl`: the command."""

from hookctl.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
