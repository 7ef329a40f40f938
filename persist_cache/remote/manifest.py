"""What an anchor holds: the manifest of an entry, and who vouches for it."""
