"""`python -m swift_core.rank FOLDER`: what a launcher starts in each process of a run."""

from __future__ import annotations

import sys
from pathlib import Path

from swift_core.errors import SwiftError


def main() -> int:
    from swift_core.training import rank_main

    try:
        rank_main(Path(sys.argv[1]))
    except SwiftError as err:
        print(f"error: {err}", file=sys.stderr)
        return err.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
