"""Whatever stands in --forget_where or in a YAML file: settings, or one line that says what is wrong."""

import datasets
import pytest
import yaml
from conftest import make_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_uib import UIBConfig
from hf_uib.cli.parser import parse
from hf_uib.data.sources import matching_rows

ROWS = make_rows(n=6).with_format(None)
ROWS = ROWS.cast_column("labels", datasets.ClassLabel(names=["a", "b", "c"])).add_column("text", list("uvwxyz"))
ROWS = ROWS.add_column("real", [0.5 * i for i in range(6)]).add_column("flag", [i % 2 == 0 for i in range(6)])

TEXT = st.text(max_size=12)
COLUMNS = st.sampled_from(ROWS.column_names) | TEXT
CONDITIONS = st.lists(
    st.tuples(COLUMNS, st.sampled_from(["=", "", "=="]), TEXT | st.integers().map(str)).map("".join), max_size=3
)


@settings(max_examples=300, deadline=None)
@given(CONDITIONS)
def test_conditions(conditions):
    try:
        kept = matching_rows(ROWS, conditions)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert kept.shape == (6,) and kept.dtype == bool


NAMES = [
    "beta",
    "prior",
    "subspace_rank",
    "learning_rate",
    "forget_target",
    "max_steps",
    "bf16",
    "posterior",
    "seed",
    "report_to",
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**40) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)


def parsed(path, content):
    path.write_text(content, encoding="utf-8")
    return parse("unlearn", "A command.", ["--config", str(path), "--use_cpu"], UIBConfig, lists={}, output_dir="out")[
        0
    ]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(NAMES) | TEXT, VALUES, max_size=3).map(yaml.safe_dump) | st.text(max_size=40))
def test_settings(tmp_path, content):
    try:
        args = parsed(tmp_path / "settings.yaml", content)
    except (ValueError, OSError) as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert isinstance(args, UIBConfig)


def test_settings_are_read_as_on_the_command_line(tmp_path):
    args = parsed(tmp_path / "a.yaml", "beta: 1e-3\nbf16: true\nlr_scheduler_kwargs: {a: 1}\nmax_steps: 7\n")
    assert args.beta == 1e-3 and args.bf16 is True and args.max_steps == 7  # YAML itself reads 1e-3 as text
    for content, message in (
        ("betta: 1", "'betta' that is not known"),
        ("beta: much", "invalid float value"),
        ("- beta", "holds no settings"),
        ("beta: [", "is no YAML"),
        ("prior: other", "choose one of"),
        ("posterior: other", "invalid choice"),
    ):
        with pytest.raises(ValueError, match=message):
            parsed(tmp_path / "b.yaml", content)


def test_a_list_given_twice_is_refused():
    from dataclasses import dataclass, field

    @dataclass
    class Given:
        rows: list[str] = field(default_factory=list)

    with pytest.raises(ValueError, match="more than once"):
        parse("unlearn", "A command.", ["--rows", "a", "--rows", "b"], Given, lists={"rows": None})
