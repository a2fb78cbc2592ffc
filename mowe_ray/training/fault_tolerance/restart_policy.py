"""The restart policy: what follows from a failure, as a value; the callers act on it.

`distributed/ray_train/worker_group.py` asks it after a failed worker group, `supervisor.py` after a dead driver.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class RestartDecision(Enum):
    """What to do after a failure."""

    RETRY = "retry"
    GIVE_UP = "give up"


@dataclass(frozen=True)
class RestartPolicy:
    """Retries as long as there is progress between failures, and a limited number of times without.

    Attributes:
        max_failures: Failures without progress that are still followed by another attempt (`compute.max_failures`).
        failures: Failures since the last progress.
    """

    max_failures: int
    failures: int = 0

    def after_failure(self, *, progressed: bool, attempts: int = 1) -> RestartPolicy:
        """Return the policy with one more failure counted.

        Args:
            progressed: There is a new checkpoint since the previous failure, so that earlier ones no longer count.
            attempts: Attempts that have failed without progress, if others have retried in between.
        """
        return RestartPolicy(self.max_failures, 1 if progressed else self.failures + attempts)

    @property
    def decision(self) -> RestartDecision:
        """Whether to try again."""
        return RestartDecision.GIVE_UP if self.failures > self.max_failures else RestartDecision.RETRY
