"""Phrases and words of a prompt."""
