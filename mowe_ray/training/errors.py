"""The error that ends a run for good."""


class RunError(ValueError):
    """Something only the user can mend; raised on all ranks together, and never retried."""
