"""Basics of all packages above: files, addresses, texts, interruption, redaction, and writable folders."""
