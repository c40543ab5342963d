"""The same answers with less memory and time."""
