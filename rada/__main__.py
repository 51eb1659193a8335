"""Entry point of `python -m rada` and of the command rada. `info`, for bug reports, works without the extra cli."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from rada.cli import main as run
    except ModuleNotFoundError as missing:
        if missing.name not in ("typer", "rich"):
            raise
        if sys.argv[1:2] != ["info"]:
            hint = f'the command line needs {missing.name}: pip install "rada[cli]"'
            print(f"rada: error: {hint}; `python -m rada info` works without", file=sys.stderr)
            sys.exit(2)
        from rada.info import describe

        print(describe(as_json="--json" in sys.argv))
    else:
        run()


if __name__ == "__main__":
    main()
