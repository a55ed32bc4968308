"""Forget and retained examples: reading, checks, pairing, fingerprints."""
