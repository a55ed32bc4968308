.PHONY: style quality test demo

style:
	ruff format hf_uib scripts tests
	ruff check --fix hf_uib scripts tests

quality:
	ruff format --check hf_uib scripts tests
	ruff check hf_uib scripts tests
	mypy

test:
	pytest -n 2

demo:
	accelerate launch scripts/unlearn.py
