"""Executors run programs: `native` on the CPU."""
