.PHONY: style quality test demo docs

style:
	ruff format hf_uib scripts tests examples docs
	ruff check --fix hf_uib scripts tests examples docs

quality:
	ruff format --check hf_uib scripts tests examples docs
	ruff check hf_uib scripts tests examples docs
	mypy

test:
	pytest -n 2

demo:
	accelerate launch scripts/unlearn.py

docs:
	sphinx-build -W -b html docs docs/_build
