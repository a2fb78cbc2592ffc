"""DeepSpeed: the engine, and optimizer state under ZeRO."""
