CODE = hf_uib benchmarks scripts tests examples docs
DEMO_DIR = unlearned
.PHONY: style quality test test-ci test-all demo docs

style:
	ruff format $(CODE)
	ruff check --fix $(CODE)

quality:
	ruff format --check $(CODE)
	ruff check $(CODE)
	mypy
	lint-imports

test:
	pytest

test-ci:
	pytest -m "not nightly"

test-all:
	pytest -m "" --cov --cov-report=term

demo:
	hf-uib demo --output_dir $(DEMO_DIR)

docs:
	sphinx-build -W -b html docs docs/_build
