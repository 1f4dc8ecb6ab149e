"""Models that embed texts, or judge how well they answer a query."""
