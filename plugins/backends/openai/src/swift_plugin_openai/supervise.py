"""Runs a server for a parent that may die: `python -I supervise.py COMMAND...`, with the parent's pipe as standard input.

When the pipe closes, because the parent asks or is gone, or when the server ends, every process of its group is ended. Imports
nothing but the standard library: it runs in the server's environment.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading

GRACE = 5.0  # seconds between asking and killing
PR_SET_PDEATHSIG = 1


def main() -> None:
    libc = ctypes.CDLL(None)
    child = subprocess.Popen(
        sys.argv[1:],
        stdin=subprocess.DEVNULL,
        process_group=0,
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),  # should this process be killed itself
    )
    asked = threading.Event()

    def watch() -> None:
        os.read(0, 1)  # returns when the parent closes its end, or is gone
        asked.set()
        end(child.pid, signal.SIGTERM)
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            end(child.pid, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    code = child.wait()
    end(child.pid, signal.SIGKILL)  # what it had started
    if not asked.is_set():
        print(f"the server ended {f'by signal {-code}' if code < 0 else f'with exit code {code}'}", flush=True)
    os._exit(128 - code if code < 0 else code)


def end(group: int, how: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, how)


main()
