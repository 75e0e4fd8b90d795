"""The path by which users know the command line: see `report.cli`."""

from lightning_gradclip.report.cli import main as main

if __name__ == "__main__":
    raise SystemExit(main())
