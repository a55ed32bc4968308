.PHONY: style quality test demo

style:
	ruff format hf_uib scripts tests examples
	ruff check --fix hf_uib scripts tests examples

quality:
	ruff format --check hf_uib scripts tests examples
	ruff check hf_uib scripts tests examples
	mypy

test:
	pytest -n 2

demo:
	accelerate launch scripts/unlearn.py
