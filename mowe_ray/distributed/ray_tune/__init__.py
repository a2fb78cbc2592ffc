"""Ray Tune: the trials of a study."""
