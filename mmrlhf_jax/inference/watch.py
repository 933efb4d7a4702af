"""Ending long work when it is asked to, with what is done kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mmrlhf_jax.command import INTERRUPTED, CommandError
from mmrlhf_jax.inference.engine import Progress, Report


@dataclass
class Watch:
    """Ends the work when `stop` says so, after what had finished by then is kept.

    `stop` gives the same answer on every process, each of which asks it at the same moments.
    """

    stop: Callable[[], bool]
    report: Report | None = None
    asked: bool = False

    def look(self, now: Progress) -> None:
        """For `decode`, which reports requests as done before it hands them out: they are out at the next report."""
        if self.report is not None:
            self.report(now)
        if self.asked:
            self.check()
        self.asked = self.stop()

    def check(self) -> None:
        """Raises CommandError where it is time to stop."""
        if self.asked or self.stop():
            raise CommandError("interrupted; what is done is kept: run the same command to go on", INTERRUPTED)
