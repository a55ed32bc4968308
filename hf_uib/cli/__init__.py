"""The command line: `hf-uib unlearn | audit | demo | app`."""
