"""What trainings of several methods need: data, one run, rewards, and what is measured on the way."""
