"""Other engines on the same checkpoint, side by side with ours."""
