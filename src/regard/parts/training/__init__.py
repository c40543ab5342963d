"""What trainings of several methods need."""
