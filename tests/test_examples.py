"""The examples run, at small size."""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "examples"))

import custom_prior  # noqa: E402


def test_custom_prior(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = custom_prior.main(steps=60)
    assert rows["UIB + entropy"]["follow_rate"] < 0.6 * rows["original"]["follow_rate"]
