"""Exact facts and pictures of attention at any length."""

from regard.catalog import lazy

__getattr__, __dir__ = lazy(__name__)
