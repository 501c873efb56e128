"""Runs bundles on devices."""
