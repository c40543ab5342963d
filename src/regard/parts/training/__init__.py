"""What trainings of several methods need: data, runs, rewards, and what is measured meanwhile."""
