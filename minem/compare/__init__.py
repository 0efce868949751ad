"""Samplers compared over seeds, each a run of its own."""
