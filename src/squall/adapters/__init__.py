"""Adapters: edits of one model in place of copies of it."""
