"""`hf-uib audit` from a checkout, for `accelerate launch scripts/audit.py ...`."""

from hf_uib.cli.main import main

if __name__ == "__main__":
    main("audit")
