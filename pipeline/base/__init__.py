"""Helpers of all other packages: files, addresses, texts, interruption, redaction, and writable folders."""
