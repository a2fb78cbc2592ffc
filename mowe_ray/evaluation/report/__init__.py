"""The report of it, as one HTML page."""
