"""Training of language models: data, one run, and what is measured on the way."""
