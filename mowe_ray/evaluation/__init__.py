"""From a model's answers to scores and reports; no ray."""
