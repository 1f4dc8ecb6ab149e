"""Models that see: images, what becomes of them, and where they stand in a prompt."""
