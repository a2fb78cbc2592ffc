"""Analysis of a study's results."""
