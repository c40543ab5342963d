"""Caches, and what a method keeps of them."""
