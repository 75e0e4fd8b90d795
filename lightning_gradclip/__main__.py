"""`python -m lightning_gradclip`: the command line, where no script is on the path."""

from lightning_gradclip.report.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
