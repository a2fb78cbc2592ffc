"""Ray Train: the driver, the worker group, and what each worker does."""
