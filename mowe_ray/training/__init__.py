"""Training floor: assembly, the step loop, validation and what a run writes; it knows nothing of Ray or DeepSpeed."""
