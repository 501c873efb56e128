"""Answers here or asks the marketplace, never by surprise."""
