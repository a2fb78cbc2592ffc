"""Serving of exports on a cluster, by Ray Serve."""
