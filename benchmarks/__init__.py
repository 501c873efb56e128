"""What needs a model and its bundle, and what measures."""
