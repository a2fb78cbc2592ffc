"""Studies: sweep files, search spaces, trials and their analysis. No torch, no ray."""
