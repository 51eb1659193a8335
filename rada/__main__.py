from __future__ import annotations

from rada.cli import main

if __name__ == "__main__":  # a process that measures memory imports this module again
    main()
