"""What the routers chose: sums and report."""
