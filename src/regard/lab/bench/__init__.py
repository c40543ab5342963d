"""What things cost here: measured in one run, in fresh processes, kept as JSON."""
