"""A run's output folder and its checkpoints, which exist whole or not at all.

A checkpoint is written into a hidden folder, flushed to disk, then renamed; a kill or a full disk leaves the last good one.
"""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from swift_core.errors import RequestError, RunError

OWN = ("plan.json", "config.yaml", "log.jsonl", "summary.json", "report.html", "data", "reference", "checkpoints")
"""What a run writes, and all that `--overwrite` removes."""


def check_output(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raise RequestError when the output folder cannot be made, holds another run, or holds files of somebody else's
    under the names that a run writes: those are never replaced."""
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"output {folder}: a file of that name exists; choose another --output")
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        reason = f"{nearest} is a file" if not nearest.is_dir() else f"{nearest} may not be written to"
        raise RequestError(f"output {folder} cannot be made: {reason}; choose another --output")
    used = [name for name in OWN if (folder / name).exists()]
    if used and "plan.json" not in used and not (resume and "checkpoints" in used):
        raise RequestError(f"output {folder} holds {used[0]!r}, and no run wrote it; choose another --output")
    if used and not resume and not overwrite:
        raise RequestError(
            f"output {folder} already holds a run. Continue it with trainer.resume=true, replace it with --overwrite, "
            "or choose another --output"
        )


def open_output(folder: Path, resume: bool, overwrite: bool) -> None:
    """Make the output folder, an earlier run's files removed. Raises RequestError as `check_output` does."""
    check_output(folder, resume, overwrite)
    if not resume:
        _remove_own(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise RequestError(f"output {folder} cannot be made: {err.strerror}") from None


def discard_output(folder: Path) -> None:
    """Remove what a request left that was refused before its first checkpoint, so that it can be put right and repeated."""
    if not Checkpoints(folder).steps():
        _remove_own(folder)
        with suppress(OSError):  # the folder stays when it holds anything else
            folder.rmdir()


def _remove_own(folder: Path) -> None:
    for name in reversed(OWN):  # the plan last: while it is there, the rest is a run's
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def put_in_place(pending: Path, final: Path) -> None:
    """Give a finished folder its name. One that had it is moved aside first, and removed when the new one is there."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    pending.rename(final)
    shutil.rmtree(old, ignore_errors=True)


class Checkpoints:
    """`checkpoints/step-N` of a run, with the links `last` and `best`."""

    def __init__(self, run: Path) -> None:
        self.run, self.folder = run, run / "checkpoints"

    def steps(self) -> list[int]:
        """Steps with a whole checkpoint, ascending."""
        found = [re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.glob("step-*")]
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def last(self) -> Path | None:
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def last_of_run(self) -> Path:
        """The last checkpoint. Raises RequestError where there is none."""
        if (last := self.last()) is None:
            raise RequestError(f"run {self.run} has no finished checkpoint yet")
        return last

    def best(self) -> Path | None:
        link = self.folder / "best"
        return link.resolve() if link.exists() else None

    def forget_after(self, step: int) -> None:
        """Remove the checkpoints of later steps: the run goes on from `step`, and they are another future of it."""
        for later in [found for found in self.steps() if found > step]:
            shutil.rmtree(self.path(later))
        for name in ("last", "best"):
            if (link := self.folder / name).is_symlink() and not link.exists():
                link.unlink()

    def begin(self, step: int) -> Path:
        """An empty hidden folder to write into. Left-overs of a killed run go."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob(".step-*"):
            shutil.rmtree(stale, ignore_errors=True)
        folder = self.pending(step)
        folder.mkdir()
        return folder

    def pending(self, step: int) -> Path:
        return self.folder / f".step-{step}.tmp"

    def commit(self, step: int) -> Path:
        """Flush what was written and give it its name."""
        pending, final = self.pending(step), self.path(step)
        for path in [*pending.rglob("*"), pending]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        put_in_place(pending, final)
        self._link("last", final)
        return final

    def abandon(self, step: int, cause: Exception) -> RunError:
        """Remove what a failed save left, and say what stays."""
        shutil.rmtree(self.pending(step), ignore_errors=True)
        last = self.last()
        kept = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
        return RunError(f"saving step {step} to {self.folder} failed: {cause}; {kept}")

    def mark_best(self, step: int) -> None:
        self._link("best", self.path(step))

    def prune(self, keep: int) -> None:
        """Keep the newest `keep` and the best."""
        best = self.best()
        for step in self.steps()[:-keep] if keep else []:
            if self.path(step).resolve() != best:
                shutil.rmtree(self.path(step))

    def _link(self, name: str, target: Path) -> None:
        fresh = self.folder / f".{name}.tmp"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(target.name)
        fresh.replace(self.folder / name)
