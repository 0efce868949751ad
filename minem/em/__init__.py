"""Expectation maximization: the loop, the E-step with its samplers, and the M-step."""
