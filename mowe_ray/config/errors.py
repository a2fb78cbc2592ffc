"""The one error a user's configuration can cause."""

from collections.abc import Sequence


class ConfigError(ValueError):
    """A configuration that cannot be used; `problems` has one `key: what is wrong` line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        assert problems, "a ConfigError names at least one problem"
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))
