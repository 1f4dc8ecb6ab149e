"""From requests to steps: what is in the KV cache, what to compute next, which token to take."""
