"""torchrun with quiet failures and patient stops: `python -m swift_plugin_torch.torchrun ARGUMENTS OF TORCHRUN`.

A failed rank has said what is wrong, and torchrun's own report would only hide that. Asked to stop, torchrun kills its ranks
after 30 seconds; here they get the signal and all the time that their step and their checkpoint take.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from swift_plugin_torch.launcher import KILLED
from swift_plugin_torch.parent import end_with_parent


def pass_on(number: int, frame: FrameType | None) -> None:
    """Give a signal to this process's children, the ranks."""
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="utf-8").split():
        os.kill(int(child), number)


if __name__ == "__main__":
    end_with_parent()
    logging.disable(logging.CRITICAL)
    signals = []
    if Path(f"/proc/self/task/{os.getpid()}/children").exists():
        signal.signal(signal.SIGTERM, pass_on)
        signals = ["--signals-to-handle=SIGHUP"]
    try:
        main([*signals, *sys.argv[1:]])
    except ChildFailedError as err:
        codes = [-failure.exitcode for failure in err.failures.values()]
        killed = [code for code in codes if code > 0 and code != signal.SIGTERM]  # that one comes from torchrun itself
        sys.exit(KILLED + killed[0] if killed else max(1, err.get_first_failure()[1].exitcode))
