"""Training: model building, training loop, validation, checkpoints and metrics; imports neither Ray nor DeepSpeed."""
