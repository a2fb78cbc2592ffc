"""Generation, metrics and reports of an evaluation; no ray."""
