"""TensorBoard, wandb and MLflow: each goes on with its history when a run does, no step missing or doubled."""
