"""The progress bar of a run: loss, tokens a second, time left. Knows numbers only."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar:
    """A bar on `console` while used as a context; `say` prints above it."""

    def __init__(self, console: Console, steps: int, done: int):
        self.console = console
        self.bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[measured]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
        )
        self.task = self.bar.add_task("", total=steps, completed=done, measured="")

    def __enter__(self) -> "ProgressBar":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def update(self, step: int, loss: float, tokens_per_s: float) -> None:
        measured = f"loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s,"
        self.bar.update(self.task, completed=step, measured=measured)

    def say(self, text: str) -> None:
        self.console.print(text)
