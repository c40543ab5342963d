"""What two or more methods need, by subject."""
