"""The checkpoint that the repository carries: its documents, its training, its record."""
