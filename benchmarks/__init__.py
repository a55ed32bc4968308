"""Methods x tasks x seeds, and what else the documentation's figures come from. ``python -m benchmarks --help``."""
