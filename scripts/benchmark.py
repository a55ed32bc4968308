"""The benchmark: ``python scripts/benchmark.py --help``, the same as ``python -m benchmarks``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.__main__ import main

if __name__ == "__main__":
    main(sys.argv[1:])
