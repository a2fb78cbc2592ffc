"""Studies: what a sweep file may say, which trials it means, what they found. No torch, no ray."""
