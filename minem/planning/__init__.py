"""What a run needs before it starts, and what this machine has."""
