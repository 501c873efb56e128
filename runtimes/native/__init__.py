"""The runner for devices, in C++, and what builds it. See README.md here."""
