"""How far a run is: a bar a step on a terminal, a line now and then elsewhere (a log, a pipe)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from edgegen.report import text

LINE_EVERY_S = 10.0
WORTH_A_LINE_S = 1.0
OTHERS_WORK = 0.1  # a step that speaks for less of the time since it began leaves its work to other steps

Tell = Callable[[str, str, float], None]


@dataclass
class _Step:
    """Time is counted only while the step is the one that speaks: steps call each other (distill times a candidate)."""

    clock: Callable[[], float]
    spent: float = 0.0
    since: float | None = None
    fraction: float = 0.0
    bar: TaskID | None = None
    said: bool = field(default=False)
    began: float = 0.0
    spoke: float = 0.0  # when its last line was written, else when it began

    def seconds(self) -> float:
        return self.spent + (self.clock() - self.since if self.since is not None else 0.0)

    def pause(self) -> None:
        self.spent, self.since = self.seconds(), None

    def left(self) -> float | None:
        """Seconds to go at the pace so far; None before the step knows its share, or where others do its work."""
        spent = self.seconds()
        known = 0 < self.fraction < 1 and spent >= OTHERS_WORK * (self.clock() - self.began)
        return spent * (1 - self.fraction) / self.fraction if known else None


class _Times(ProgressColumn):
    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        step: _Step = task.fields["step"]
        left = step.left() if step.since is not None else None
        return Text(text.seconds(step.seconds()) + (f", {text.seconds(left)} left" if left is not None else ""))


@contextmanager
def progress(
    *, quiet: bool = False, console: Console | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Tell]:
    """Yield tell(step, text, fraction 0..1), which shows the step's progress on standard error.

    A step that only ever tells 0 has a moving bar without an end, and is full when another step speaks. A step that
    told 1 starts anew when it speaks again. Without a terminal: a line of each step at most every LINE_EVERY_S seconds,
    and one at the end of each that took more than WORTH_A_LINE_S. With `quiet`: nothing.
    """
    console = console or Console(stderr=True)
    if quiet:
        yield lambda step, note, fraction: None
    elif console.is_terminal:
        bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            _Times(),
            TextColumn("[dim]{task.fields[note]}"),
            console=console,
        )
        with bars:
            yield _Teller(clock, _Drawn(bars))
    else:
        yield _Teller(clock, _Lines(console, clock))


class _Teller:
    def __init__(self, clock: Callable[[], float], view: _Drawn | _Lines) -> None:
        self._clock, self._view = clock, view
        self._steps: dict[str, _Step] = {}
        self._current = ""

    def __call__(self, name: str, note: str, fraction: float) -> None:
        now = self._clock()
        step = self._steps.setdefault(name, _Step(self._clock, began=now, spoke=now))
        if name != self._current and self._current:
            self._leave(self._current)
        self._current = name
        if step.fraction >= 1.0:
            step.spent, step.since, step.said, step.began, step.spoke = 0.0, None, False, now, now
        if step.since is None:
            step.since = now
        step.fraction = min(max(fraction, 0.0), 1.0) if math.isfinite(fraction) else 0.0
        if step.fraction >= 1.0:
            step.pause()
        self._view.show(name, step, note)

    def _leave(self, name: str) -> None:
        step = self._steps[name]
        step.pause()
        self._view.left(step)


class _Drawn:
    def __init__(self, bars: Bars) -> None:
        self._bars = bars

    def show(self, name: str, step: _Step, note: str) -> None:
        if step.bar is None:
            step.bar = self._bars.add_task(escape(name), total=None, note="", step=step)
        self._bars.update(step.bar, total=1.0 if step.fraction else None, completed=step.fraction, note=escape(note))
        if not step.fraction:
            # update() takes None for "unchanged", so a bar that starts anew needs this
            self._bars.tasks[self._bars.task_ids.index(step.bar)].total = None

    def left(self, step: _Step) -> None:
        if step.bar is not None and not step.fraction:
            self._bars.update(step.bar, total=1.0, completed=1.0)


class _Lines:
    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._console, self._last = console, clock()

    def show(self, name: str, step: _Step, note: str) -> None:
        if step.fraction >= 1.0:
            if not step.said and step.seconds() >= WORTH_A_LINE_S:
                self._say(step, f"{name}: done in {text.seconds(step.seconds())}")
                step.said = True
        elif step.clock() - min(self._last, step.spoke) >= LINE_EVERY_S:  # nothing said for so long, or not by it
            share = [f"{step.fraction * 100:.0f}%"] if step.fraction else []
            left = step.left()
            share += [f"about {text.seconds(left)} left"] if left is not None else []
            self._say(step, f"{name}: {', '.join([*share, note] if note else share)}")

    def _say(self, step: _Step, line: str) -> None:
        self._last = step.spoke = step.clock()
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def left(self, step: _Step) -> None:
        """Nothing to say: the next line comes from the step that speaks now."""
