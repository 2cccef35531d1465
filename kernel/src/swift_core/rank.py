"""`python -m swift_core.rank FOLDER`: what a launcher starts in each process of a run.

A rank's error goes into the run's `data/error-RANK.json`, for the launcher to say it once for all ranks.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path

from swift_core.errors import Interrupted, SwiftError, one_line
from swift_core.plan import write_json


def main() -> int:
    """The exit code of this rank: 0 when it ended as asked, interrupted or not."""
    from swift_core.training import rank_main

    folder = Path(sys.argv[1])
    try:
        rank_main(folder)
    except SwiftError as err:
        _report(folder, err, str(err), err.exit_code)
        return 0 if isinstance(err, Interrupted) else err.exit_code
    except KeyboardInterrupt:
        return 1
    except Exception as err:
        _report(folder, err, f"unexpected {one_line(err)}", 1)
        return 1
    return 0


def _report(folder: Path, err: Exception, message: str, code: int) -> None:
    error = {"type": type(err).__name__, "message": message, "exit_code": code, "time": time.time()}
    error["traceback"] = "".join(traceback.format_exception(err))
    write_json(folder / "data" / f"error-{int(os.environ.get('RANK', 0)):05d}.json", error)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # everything is closed; threads of the libraries that are still ending can only do harm
