"""The progress bar for a terminal: one bar a task, and the training steps as one bar with loss, speed and time left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swift_core.events import Event, PlainConsole, format_seconds

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class RichConsole:
    """A listener that draws bars on standard error, with other events as lines above them."""

    def __init__(self) -> None:
        from rich.console import Console  # drawing is for a tty alone

        self._plain = PlainConsole()
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, event: Event) -> None:
        if event.kind == "step":
            data = event.data
            left = format_seconds(data["seconds_left"])
            text = f"training  loss {data['loss']:.4f}  {data['tokens_per_second']:.0f} tokens/s  {left} left" + data.get(
                "told", ""
            )
            self._show("step", text, data["step"], data["steps"], data["step"] == data["steps"])
        elif event.kind == "progress":
            task = event.data["task"]
            self._show(task, task, event.data["done"], event.data["total"], event.data.get("finished", False))
        elif event.kind in ("done", "closed"):
            self._stop()
        else:
            line = self._plain.line(event)
            if line:
                (self._progress.console if self._progress else self._console).print(line, highlight=False, markup=False)

    def _show(self, key: str, text: str, done: int, total: int | None, finished: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._progress.start()
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(text, total=total)
        self._progress.update(self._tasks[key], description=text, completed=done, total=total)
        if finished:
            if key != "step":
                self._progress.remove_task(self._tasks[key])
            del self._tasks[key]
            if not self._tasks:
                self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress, self._tasks = None, {}
