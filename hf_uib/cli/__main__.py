"""``python -m hf_uib.cli``, and ``accelerate launch -m hf_uib.cli``, are `hf-uib`."""

from .main import main

if __name__ == "__main__":
    main()
