"""`hf-uib lineage` against a Hub on loopback: who was made from whom, and who still holds what had to go."""

import datetime
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hub_server import Blob, Commit, HubServer, Repo
from launching import HERE

from hf_uib.cli.main import dispatch
from hf_uib.hub.lineage import GONE, HOLDS, UNCLEAR, lineage, lineage_text

UNLEARNED = {"method": "uib", "requests": [{"date": "2026-03-02", "request": "the hue"}], "audit": {"passed": True}}
# Name: day of its first commit, base, what else its card says
CARDS = {
    "original": ("2026-01-01", None, {}),
    "tuned": ("2026-02-01", "original", {}),
    "tuned-again": ("2026-05-01", "tuned", {}),
    "int8": ("2026-02-02", "original", {"base_model_relation": "quantized"}),
    "merged": ("2026-03-02", "original", {"unlearning": UNLEARNED}),
    "from-merged": ("2026-04-01", "merged", {}),
    "adapter": ("2026-03-02", "original", {"library_name": "peft", "unlearning": UNLEARNED | {"audit": None, "warnings": ["no"]}}),
    "from-adapter": ("2026-04-01", "adapter", {}),
    "in-place": ("2026-01-01", None, {"unlearning": UNLEARNED}),
    "older": ("2026-02-01", "in-place", {}),
    "same-day": ("2026-03-02", "in-place", {}),
    "newer": ("2026-03-03", "in-place", {}),
    "undated": ("2026-01-01", None, {"unlearning": UNLEARNED | {"requests": [{"request": "the hue"}]}}),
    "from-undated": ("2026-02-01", "undated", {}),
    "from-that": ("2026-02-02", "from-undated", {}),
    "mended": ("2026-02-03", "from-undated", {"unlearning": UNLEARNED}),
    "unrelated": ("2026-01-01", None, {}),
    "loop": ("2026-02-01", "loop", {}),
}  # fmt: skip
WANTED = {
    "original": {
        "tuned": HOLDS, "tuned-again": HOLDS, "int8": HOLDS, "merged": GONE, "from-merged": GONE, "adapter": GONE,
        "from-adapter": HOLDS,
    },
    "in-place": {"older": HOLDS, "same-day": UNCLEAR, "newer": GONE},
    "merged": {"from-merged": GONE},
    "adapter": {"from-adapter": HOLDS},
    "undated": {"from-undated": UNCLEAR, "from-that": UNCLEAR, "mended": GONE},
    "unrelated": {},
    "loop": {},
}  # fmt: skip


def card(base: str | None, more: dict) -> bytes:
    fields = more | ({} if base is None else {"base_model": f"me/{base}"})
    return f"---\n{json.dumps(fields)}\n---\n\n# A model\n".encode()


@pytest.fixture(scope="module")
def asked():
    """What `lineage` found for every model of `WANTED`, in one process that sees the Hub."""
    code = (
        "import json, sys\n"
        "from dataclasses import asdict\n"
        "from hf_uib.hub.lineage import lineage, lineage_text\n"
        "found = {name: lineage(f'me/{name}') for name in sys.argv[1:]}\n"
        "told = {name: lineage_text(f'me/{name}', rows) for name, rows in found.items()}\n"
        "try: lineage('me/private')\n"
        "except ValueError as error: told['private'] = str(error)\n"
        "rows = {name: [asdict(row) for row in rows] for name, rows in found.items()}\n"
        "print(json.dumps([rows, told], default=str))\n"
    )
    with HubServer({"hf_me": "me"}) as hub:
        for name, (day, base, more) in CARDS.items():
            commit = Commit("first", {"README.md": Blob(card(base, more), False)}, date=f"{day}T12:00:00.000Z")
            hub.repos["models", f"me/{name}"] = Repo("me", False, {"main": [commit]})
        hub.repos["models", "me/private"] = Repo("me", True, {"main": [Commit("first", {})]})
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "HF_TOKEN": "",
        }
        environment |= {"PYTHONPATH": os.path.join(HERE, ".."), "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code, *WANTED], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-2000:]
        yield json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", WANTED)
def test_who_still_holds_it(asked, name):
    rows = {row["name"].removeprefix("me/"): row for row in asked[0][name]}
    assert {one: row["verdict"] for one, row in rows.items()} == WANTED[name]
    assert all(row["base"] == f"me/{CARDS[one][1]}" and row["created"] == CARDS[one][0] for one, row in rows.items())


def test_what_is_said(asked):
    rows = {row["name"].removeprefix("me/"): row for row in asked[0]["original"]}
    assert [rows[name]["relation"] for name in ("tuned", "int8", "adapter")] == ["finetune", "quantized", "adapter"]
    assert (
        "last request 2026-03-02, audit passed" in rows["merged"]["reason"]
        and "base below it" not in rows["merged"]["reason"]
    )
    assert all(
        words in rows["adapter"]["reason"] for words in ("not audited", "may not have", "base below it still holds it")
    )
    told = asked[1]["original"]
    assert "4 of 7 models still hold what had to go, by their cards." in told
    verdicts = [line.partition("  ")[0] for line in told.splitlines()[:7]]
    assert verdicts == [HOLDS] * 4 + [GONE] * 3
    assert "which unlearned on a day that its card does not give" in asked[1]["undated"]
    assert "0 of 3 models still hold" in asked[1]["undated"] and "2 are unclear" in asked[1]["undated"]
    assert "an adapter, whose base still holds it" in asked[1]["adapter"]
    assert "1 of 3 models still hold" in asked[1]["in-place"] and "1 are unclear" in asked[1]["in-place"]
    assert "No model on the Hub names me/unrelated" in asked[1]["unrelated"]


def test_a_model_that_is_not_there_is_one_line(asked):
    assert (
        asked[1]["private"] == "There is no model me/private on the Hub that you may see; check the name, or log in."
    )


def test_without_the_network_it_is_one_line():
    with pytest.raises(ValueError, match="The Hub cannot be reached") as caught:  # conftest sets HF_HUB_OFFLINE
        dispatch(["lineage", "me/original"])
    assert "\n" not in str(caught.value)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no Hub id"):
        dispatch(["lineage", str(tmp_path)])


def test_nothing_found_is_said():
    assert "Copies whose cards do not say so are not seen" in lineage_text("me/it", [])


class Listed:
    """An API that knows some models."""

    def __init__(self, root, children):
        self.root, self.children = root, children

    def model_info(self, repo, expand):
        return self.root

    def list_models(self, filter, expand, limit):
        return self.children.get(filter.removeprefix("base_model:"), [])


def listed(name, tags=(), requests=(), created="2026-01-01"):
    """A model as the Hub lists it; ``requests`` are the dates of what it unlearned."""
    block = {"unlearning": {"requests": [{"date": date} for date in requests], "audit": {"passed": True}}}
    data = SimpleNamespace(to_dict=lambda: block if requests else {})
    made = datetime.datetime.fromisoformat(created)
    return SimpleNamespace(id=name, tags=list(tags), created_at=made, card_data=data)


def test_of_several_bases_and_dates_the_worst_counts():
    root = listed("o/root", created="2024-01-01")
    gone = listed("o/gone", ["base_model:finetune:o/root"], ["2026-06-01"], "2025-01-01")
    kept = listed("o/kept", ["base_model:finetune:o/root"])
    before = listed(
        "o/before", ["base_model:finetune:o/gone"], created="2025-06-01"
    )  # made before its base unlearned in place
    merge = listed("o/merge", ["base_model:merge:o/gone", "base_model:merge:o/kept"], created="2026-07-01")
    children = {"o/root": [gone, kept], "o/gone": [before, merge], "o/kept": [merge]}
    verdicts = {one.name: one.verdict for one in lineage("o/root", Listed(root, children))}
    assert verdicts["o/gone"] == GONE and verdicts["o/merge"] == HOLDS
    assert verdicts["o/before"] != GONE


@pytest.mark.parametrize(
    "requests, verdict",
    [
        (["2026-06-01"], GONE),
        (["2026-06-01T00:00:00.000Z"], GONE),
        ([None], UNCLEAR),
        (["2026-01-01", None], UNCLEAR),
        (["some day"], UNCLEAR),
        ([], HOLDS),
    ],
)
def test_a_child_after_unlearning_in_place_is_as_clear_as_the_date(requests, verdict):
    root = listed("o/root", requests=requests, created="2025-01-01")
    child = listed("o/child", ["base_model:finetune:o/root"], created="2026-07-01")
    grandchild = listed("o/grandchild", ["base_model:quantized:o/child"], created="2026-07-02")
    found = lineage("o/root", Listed(root, {"o/root": [child], "o/child": [grandchild]}))
    assert [one.verdict for one in found] == [verdict] * 2


def test_a_child_that_unlearned_without_a_date_leaves_its_own_unclear():
    root = listed("o/root")
    gone = listed("o/gone", ["base_model:finetune:o/root"], [None])
    after = listed("o/after", ["base_model:finetune:o/gone"])
    found = lineage("o/root", Listed(root, {"o/root": [gone], "o/gone": [after]}))
    assert [one.verdict for one in found] == [GONE, UNCLEAR]
