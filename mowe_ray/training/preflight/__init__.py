"""What can be told before a run about the machines it would use; the floor above asks every node."""
