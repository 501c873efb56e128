"""What a bundle is, and everything that runs one."""
