"""What every room needs: files, addresses, texts, interruption, redaction, and where a process may write."""
