"""`hf-uib app` from a checkout: a model before and after unlearning, on a page on this machine."""

from hf_uib.cli.main import main

if __name__ == "__main__":
    main("app")
