"""Prompts, inversion and editing of diffusion pipelines."""
