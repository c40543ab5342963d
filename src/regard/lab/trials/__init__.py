"""What a method is judged on; every trial takes a model and a list of configurations."""
