"""Settings every test shares; they are made before any test imports torch or ray."""

import os

# Set, not defaulted: two cores and a deterministic sum order, whatever the developer's shell says.
os.environ.update(
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    RAY_USAGE_STATS_ENABLED="0",
    WANDB_MODE="offline",
)
