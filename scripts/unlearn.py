"""`hf-uib unlearn` from a checkout, for `accelerate launch scripts/unlearn.py ...`; without arguments the demo."""

from hf_uib.cli.main import main

if __name__ == "__main__":
    main("unlearn")
