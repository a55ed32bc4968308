"""Pushing, against a Hub on loopback: what is there afterwards, what must never be, and what happens when something goes wrong.

One process plays every scenario of hub_client.py; each test looks at its own, on the side that asked and on the server.
"""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import make_rows
from hub_server import HubServer, validate
from launching import HERE

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("hub")]  # one server, one client

TOKEN, STRANGER = "hf_owner_of_everything", "hf_somebody_else"
ADAPTER = {
    ".gitattributes",
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "preprocessor_config.json",
}
ADAPTER |= {"uib_state.safetensors"}
MERGED = {".gitattributes", "README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
STRATEGIES = {"end": None, "every_save": None, "checkpoint": "last-checkpoint", "all_checkpoints": "checkpoint-2"}
SAME = 1e-5  # of logits
CHANGED = 0.1  # of a logit: what a run of a few steps does at least


class Played:
    """What the client saw, the server as it was left, and the client's folder."""

    def __init__(self, hub: HubServer, folder, seen: dict):
        self.hub, self.folder, self.seen = hub, folder, seen

    def __getitem__(self, scenario: str):
        seen = self.seen[scenario]
        assert not (isinstance(seen, dict) and "failed" in seen), seen["failed"]
        return seen

    def commits(self, name: str, branch: str = "main") -> list:
        """Those after the one that the Hub makes, oldest first."""
        return self.hub.repos["models", f"tester/{name}"].branches[branch][1:]

    def files(self, name: str, branch: str = "main") -> set[str]:
        return set(self.hub.repos["models", f"tester/{name}"].branches[branch][-1].files)


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with HubServer({TOKEN: "tester", STRANGER: "stranger"}) as hub:
        environment = os.environ | {
            "PYTHONPATH": f"{HERE}{os.pathsep}{os.path.join(HERE, '..')}",
            "OMP_NUM_THREADS": "1",
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(folder / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, os.path.join(HERE, "hub_client.py"), str(folder), STRANGER]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr[-3000:]
        yield Played(hub, folder, json.loads((folder / "seen.json").read_text()))


def card(**fields) -> str:
    return f"---\n{json.dumps(fields)}\n---\n\n# A model\n"


RESULT = {"task": {"type": "t"}, "dataset": {"type": "d", "name": "d"}, "metrics": [{"type": "m", "value": 0.0}]}


@pytest.mark.parametrize(
    "content, error",
    [
        (card(license="mit", base_model="me/it", tags=["a"], unlearning={"method": "uib"}), None),
        (card(**{"model-index": [{"name": "m", "results": [RESULT]}]}), None),
        ("# No metadata\n", None),
        ("---\n- a list\n---\n", "mapping"),
        ("---\na: [\n---\n", "YAML"),
        (card(base_model=""), "base_model"),
        (card(base_model="/tmp/model"), "base_model"),
        (card(base_model_relation="cousin"), "base_model_relation"),
        (card(license="mine"), "license"),
        (card(language="English"), "language"),
        (card(datasets=["not a name"]), "datasets"),
        (card(tags="a"), "tags"),
        (card(**{"model-index": {"name": "m"}}), "model-index"),
        (card(**{"model-index": [{"results": [RESULT]}]}), "name"),
        (card(**{"model-index": [{"name": "m", "results": [RESULT | {"dataset": {"type": "d"}}]}]}), "dataset.name"),
        (card(**{"model-index": [{"name": "m", "results": [RESULT | {"metrics": [{"type": "m"}]}]}]}), "value"),
    ],
)
def test_the_server_refuses_what_the_hub_refuses(content, error):
    _, errors, warnings = validate(content)
    assert bool(errors) == (error is not None) and (error is None or error in errors[0])
    assert bool(warnings) == (content == "# No metadata\n")


def test_a_stale_parent_is_refused(played):
    assert "412" in played["stale_parent"]["stale"]["text"] and played["stale_parent"]["fresh"] is None


def test_push_and_reload(played):
    seen = played["push"]
    assert played.files("vit-uib") == ADAPTER
    assert [commit.oid for commit in played.commits("vit-uib")] == [seen["commit"]]
    assert seen["changed"] > CHANGED and seen["peft"] < SAME and seen["auto"] < SAME
    assert seen["processor"] == [0.5]


def test_card_of_a_push(played):
    seen = played["push"]
    data = seen["data"]
    assert data["base_model"] == "tester/vit-biased" and data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft" and data["pipeline_tag"] == "image-classification"
    assert data["license"] == "apache-2.0" and data["language"] == "en" and data["datasets"] == "tester/scans"
    assert data["tags"] == ["unlearning", "uib", "hf_uib", "peft", "lora", "medical"]
    block = data["unlearning"]
    assert block["method"] == "uib" and [s["rows"] for s in block["data"]] == [24, 16, 12, 20]
    assert [request["request"] for request in block["requests"]] == ["the pictures of clinic A"]
    assert seen["results"] == [["test", "accuracy", 0.625], ["forget", "accuracy, forget set", 0.25]]
    assert 'PeftModel.from_pretrained(base, "tester/vit-uib")' in seen["text"]


def test_card_names_the_revision_of_the_base(played):
    seen = played["push"]
    assert seen["data"]["unlearning"]["base_revision"] == seen["base_revision"]
    assert f"revision `{seen['base_revision']}`" in seen["text"]


def test_adapter_by_id(played):
    assert played["adapter_by_id"]["apart"] < SAME and played["adapter_by_id"]["trainable"]


# ---- What must never be published -----------------------------------------------------------------------------------


def published(played, own: bool = True):
    """Repository, path and content of every file of every commit; ``own`` leaves stock Trainer's out."""
    found = set()
    for (_, name), repo in played.hub.repos.items():
        if (name == "tester/stock") != own:
            for commits in repo.branches.values():
                found |= {(name, path, blob.content) for commit in commits for path, blob in commit.files.items()}
    return found


def test_no_token_and_no_pickled_arguments(played):
    files = published(played)
    assert {f"tester/vit-{strategy}" for strategy in STRATEGIES} <= {name for name, _, _ in files}
    for name, path, content in files:
        assert "training_args" not in path and TOKEN.encode() not in content, (name, path)


def test_nothing_that_only_lies_in_the_output_folder(played):
    """Every strategy, artifact and branch: train.csv, request.yaml, .env, runs/, somebody's model and notebooks stay here."""
    secret = b"a secret that must stay here"
    found = [(name, path) for name, path, content in published(played) if secret in content]
    assert not found
    kept = [path for path in played.folder.rglob("*") if path.is_file() and path.read_bytes() == secret]
    names = {path.relative_to(played.folder).parts[0] for path in kept}
    assert {f"vit-{strategy}" for strategy in STRATEGIES} | {"vit-uib", "vit-named"} <= names
    by_name = {path.name for path in kept if path.relative_to(played.folder).parts[0] == "vit-named"}
    assert {"train.csv", "request.yaml", ".env", "model.safetensors", "optimizer.pt", "analysis.ipynb"} <= by_name


def test_an_adapter_of_another_name_goes_up_whole(played):
    """With the processor's files, whatever they are called, and our own figures and reports."""
    inside = {"clinic/adapter_config.json", "clinic/adapter_model.safetensors", "words.model", "odd/more.dat"}
    named = ADAPTER - {"adapter_config.json", "adapter_model.safetensors"} | inside
    assert played.files("vit-named") == named | {"audit.json", "audit.png"}
    assert played.files("vit-named-merged") == MERGED | {"words.model", "odd/more.dat", "audit.png"}
    assert played["named_adapter"]["apart"] < SAME
    assert {"train.csv", "merged/train.csv", "runs/events.out.1"} <= set(played["named_adapter"]["left"])


def test_no_row_of_any_set(played):
    rows = [
        row["pixel_values"].numpy() for n, seed in ((24, 1), (16, 2), (12, 3)) for row in make_rows(n=n, seed=seed)
    ]
    needles = [row.tobytes()[:16] for row in rows] + [str(float(row.flat[0])).encode() for row in rows]
    for name, path, content in published(played):
        assert not any(needle in content for needle in needles), (name, path)
    shown = np.concatenate(rows[:3]).tobytes() + str(float(rows[0].flat[0])).encode()
    assert sum(needle in shown for needle in needles) == 4  # the search finds what is there


def test_stock_trainer_is_found_out(played):
    """Negative control: the same search over what Transformers' own Trainer pushes."""
    leaks = {path for _, path, content in published(played, own=False) if TOKEN.encode() in content}
    assert leaks == {"training_args.bin"}


@pytest.mark.parametrize(
    "files",
    [
        r".*\.md|config\.json|preprocessor_config\.json|.*\.safetensors|.*\.pt|.*\.pth",
        "adapter_config.json",
        ".*trainer_state.json",
    ],
)
def test_no_path_of_this_machine(played, files):
    matching = [entry for entry in published(played) if re.fullmatch(files, entry[1])]
    assert matching
    for name, path, content in matching:
        assert str(played.folder).encode() not in content, (name, path)


# ---- How it is pushed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy, checkpoint", STRATEGIES.items())
def test_strategies(played, strategy, checkpoint):
    """The trained adapter at last; while training what was asked for."""
    assert played[strategy]["apart"] < SAME
    titles = [commit.title for commit in played.commits(f"vit-{strategy}")]
    assert titles[-1] == "Model save" and (len(titles) == 1) == (strategy == "end")
    assert all(title.startswith("Training in progress, step ") for title in titles[:-1])
    folders = {path.split("/")[0] for path in played.files(f"vit-{strategy}") if "/" in path}
    assert folders - {"checkpoint-4"} == ({checkpoint} if checkpoint else set())
    assert {path for path in played.files(f"vit-{strategy}") if "/" not in path} == ADAPTER


def test_resume_from_a_checkpoint_on_the_hub(played):
    assert played["resumed"]["apart"] == 0 and played["resumed"]["halfway"] > 0.1


def test_a_slow_upload_does_not_overtake_the_next(played):
    assert played["order"]["step"] == 4


def test_a_second_push_commits_nothing(played):
    assert played["push_twice"] is None and len(played.commits("vit-twice")) == 1


def test_a_second_push_changes_the_state_files_header_at_most(played):
    first, *others = played.commits("vit-twice")
    for commit in others:
        assert {path for path, blob in commit.files.items() if blob != first.files[path]} == {"uib_state.safetensors"}


def test_to_a_named_revision(played):
    seen = played["to_revision"]
    assert seen["missing"]["type"] == "RevisionNotFoundError" and "v2" in seen["missing"]["text"]
    assert played.files("vit-revision", "v2") == ADAPTER and seen["apart"] < SAME
    assert played.files("vit-revision") == {".gitattributes"}


# ---- Which model ----------------------------------------------------------------------------------------------------


def test_merged(played):
    seen = played["merged"]
    assert played.files("vit-merged") == MERGED and seen["kind"] == "ViTForImageClassification"
    assert seen["apart"] < SAME and seen["changed"] > CHANGED and seen["processor"] == [0.5]
    assert seen["data"]["base_model_relation"] == "finetune" and seen["data"]["library_name"] == "transformers"
    assert seen["requests"] == seen["data"]["unlearning"]["requests"] and len(seen["requests"]) == 1
    assert 'from_pretrained("tester/vit-merged")' in seen["text"] and "withdraw" in seen["text"]


def test_both(played):
    seen = played["both"]
    assert played.files("vit-both") == ADAPTER and played.files("vit-both-merged") == MERGED
    assert seen["adapter"] < SAME and seen["merged"] < SAME
    assert 'from_pretrained("tester/vit-both-merged")' in seen["text"]
    assert all(played.hub.repos["models", f"tester/vit-both{end}"].private for end in ("", "-merged"))


def test_undo_by_id(played):
    assert played["both"]["undone"] < SAME


def test_both_beside_a_private_repository(played):
    assert played["both_beside_private"] is None
    assert played.hub.repos["models", "tester/vit-secret-merged"].private


def test_both_to_a_named_revision(played):
    assert played["both_to_revision"]["error"] is None
    assert played.files("vit-both-revision", "v2") == ADAPTER
    assert played.files("vit-both-revision-merged", "v2") == MERGED


def test_merged_where_an_adapter_was(played):
    seen = played["merged_over_adapter"]
    assert played.files("vit-replaced") == MERGED and not seen["needs_base"] and seen["apart"] < SAME


def test_results_table(played):
    assert played["results_table"]["loaded"] == played["results_table"]["rows"]


# ---- What is refused, and what goes wrong ---------------------------------------------------------------------------


def test_bad_token(played):
    seen = played["bad_token"]
    for when in ("after", "before"):
        assert seen[when]["type"] == "HfHubHTTPError" and "401" in seen[when]["text"]
        assert "Invalid credentials" in seen[when]["text"] and "hf_wrong" not in seen[when]["text"]
    assert "403" in seen["foreign"]["text"] and STRANGER not in seen["foreign"]["text"]
    assert not any("refused" in name for _, name in played.hub.repos)
    assert seen["local"] < SAME


def test_unknown_licence(played):
    """Refused before anything is uploaded; the next push is not harmed."""
    seen = played["refused_licence"]
    assert seen["error"]["type"] == "ValueError" and '"license" must be one of' in seen["error"]["text"]
    assert seen["second"] is None and len(played.commits("vit-licence")) == 1


def test_private(played):
    seen = played["private"]
    assert played.hub.repos["models", "tester/vit-private"].private and seen["own"] < SAME
    for who in ("nobody", "stranger"):
        listing, loading = seen[who]
        assert listing["type"] == "RepositoryNotFoundError" and "adapter_config.json" in loading["text"]


def test_race(played):
    """Somebody else's commit first: a clear error, nothing half done, and the next push goes through."""
    seen = played["race"]
    for status in ("409", "412"):
        assert status in seen[status]["text"] and "A commit has happened since" in seen[status]["text"]
    assert seen["meanwhile"] == [".gitattributes"]
    assert len(played.commits("vit-race")) == 1 and seen["apart"] < SAME
    assert played["race_while_training"]["apart"] < SAME


def test_connection_lost_in_an_upload(played):
    assert played["connection_lost"]["apart"] < SAME and played.files("vit-lost") == ADAPTER
    puts = [request for request in played.hub.requests if request.startswith("PUT")]
    assert len(puts) == len(set(puts)) + 1  # the lost one was sent again


def test_answer_to_a_commit_lost(played):
    """The commit is there, the client cannot know; pushing again is enough."""
    seen = played["answer_lost"]
    assert seen["error"]["type"] == "RemoteProtocolError" and seen["second"] is None
    first, *others = played.commits("vit-answer")
    assert set(first.files) == ADAPTER and all(set(commit.files) == ADAPTER for commit in others)


def test_nothing_is_left_to_go_wrong(played):
    assert played.hub.faults == []
