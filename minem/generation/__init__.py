"""Many draws at once from a KV cache whose slots refill as sequences finish."""
