"""Words, frames and cross-attention of speech models."""
