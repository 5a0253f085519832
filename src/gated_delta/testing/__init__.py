"""Verify a build: input factories, the error budget, oracles, and a self-test over every operator."""
