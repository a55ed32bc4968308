"""Which models on the Hub were made from a model, by what their cards say, and which of them still hold what had to go."""

import datetime
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from .card import hub_id

FIELDS: Any = ["cardData", "createdAt", "tags"]  # of a model, that are asked for
MOST = 1000  # models that are listed
WORST = HOLDS, UNCLEAR, GONE = "still holds it", "unclear", "unlearned"  # the worst first


@dataclass(frozen=True)
class Descendant:
    """A model whose card names another as its base.

    Attributes:
        name: Hub id; base: of the model it was made from.
        relation: adapter, finetune, merge or quantized; "not stated" if the card does not say.
        created: the day its repository was made, or None.
        verdict: `HOLDS`, `GONE` or `UNCLEAR`; reason: in words.
    """

    name: str
    base: str
    relation: str
    created: datetime.date | None
    verdict: str
    reason: str


def lineage(repo: str, api: HfApi | None = None) -> list[Descendant]:
    """Models that were made from a model, and from those, as their cards and tags say. Weights are not looked at.

    A model that was made from ``repo`` still holds what had to go, unless its own card says that it unlearned, or it was made from
    one that did. Where ``repo`` itself is the unlearned model, those that are older than its last request were made from the
    weights before; where its card gives no date, its own models are unclear.

    Args:
        repo: Hub id.
        api: of another endpoint, or with another token.

    Raises:
        ValueError: there is no such model, or the Hub cannot be reached.
    """
    if hub_id(repo) is None:
        raise ValueError(f"{repo} is no Hub id; give one, as in my-org/my-model.")
    api = api or HfApi()
    try:
        root = api.model_info(repo, expand=FIELDS)
        found: dict[str, Descendant] = {}
        waiting = [(root, _Origin.of_root(root))]
        while waiting and len(found) < MOST:
            parent, origin = waiting.pop(0)
            for child in api.list_models(filter=f"base_model:{parent.id}", expand=FIELDS, limit=MOST - len(found)):
                told, known = _descendant(child, parent.id, origin), found.get(child.id)
                # of several bases the worst one counts
                if child.id != root.id and (known is None or WORST.index(told.verdict) < WORST.index(known.verdict)):
                    found[child.id] = told
                    waiting.append((child, _Origin.of_child(child, told)))
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"There is no model {repo} on the Hub that you may see; check the name, or log in."
        ) from error
    except HfHubHTTPError as error:
        raise ValueError(f"The Hub did not answer the question about {repo} ({type(error).__name__}).") from error
    except Exception as error:  # offline mode, and whatever the HTTP client says of a connection
        raise ValueError(
            f"The Hub cannot be reached ({type(error).__name__}); lineage is asked there. Unset HF_HUB_OFFLINE, or try again later."
        ) from error
    return list(found.values())


@dataclass(frozen=True)
class _Origin:
    """What a model hands on to those that were made from it.

    Attributes:
        verdict: of a model without an unlearning card of its own; reason: what is said of the base then.
        since: the day on which the base unlearned in place; models that are older were made from the weights before.
    """

    verdict: str
    reason: str = "and its card tells of no unlearning"
    since: datetime.date | None = None

    @classmethod
    def of_root(cls, root: Any) -> "_Origin":
        block = unlearning_of(root)
        adapter = any(tag.startswith("base_model:adapter:") for tag in root.tags or [])
        return cls(HOLDS) if block is None else cls._unlearned(_last_request(block), adapter)

    @classmethod
    def of_child(cls, child: Any, told: Descendant) -> "_Origin":
        """Whoever is no older than its own last request was never there with other weights."""
        if (block := unlearning_of(child)) is None:
            return cls(told.verdict)
        origin = cls._unlearned(_last_request(block), told.relation == "adapter")
        in_place = origin.since is None or (told.created is not None and told.created < origin.since)
        return origin if in_place else cls(GONE)

    @classmethod
    def _unlearned(cls, since: datetime.date | None, adapter: bool) -> "_Origin":
        """An adapter's own children are made from its base too; without a date any of them may be from the weights before."""
        if adapter:
            return cls(HOLDS, "an adapter, whose base still holds it")
        if since is None:
            return cls(UNCLEAR, "which unlearned on a day that its card does not give")
        return cls(GONE, since=since)


def unlearning_of(model: Any) -> dict | None:
    """The block that an unlearning card has, or None."""
    card = model.card_data.to_dict() if model.card_data is not None else {}
    block = card.get("unlearning")
    return block if isinstance(block, dict) else None


def _last_request(block: dict) -> datetime.date | None:
    """The day of the last request; None if no card says."""
    dates = [one.get("date") for one in block.get("requests") or [] if isinstance(one, dict)]
    try:
        return max(datetime.date.fromisoformat(str(date)[:10]) for date in dates)  # a time may follow
    except ValueError:  # none, or none that is a date
        return None


def _descendant(child: Any, base: str, origin: _Origin) -> Descendant:
    created = child.created_at.date() if child.created_at else None
    named = re.compile(rf"base_model:(\w+):{re.escape(base)}")
    relation = next((match[1] for tag in child.tags or [] if (match := named.fullmatch(tag))), "not stated")
    block = unlearning_of(child)
    if block is not None:
        verdict, reason = GONE, _of_card(block, relation)
    elif origin.verdict == GONE and origin.since is not None and (created is None or created <= origin.since):
        verdict = UNCLEAR if created in (None, origin.since) else HOLDS
        reason = f"its base unlearned on {origin.since}, and it is {'as old' if verdict == UNCLEAR else 'older'}"
    elif origin.verdict == GONE:
        verdict, reason = GONE, "made from a model that unlearned"
    else:
        verdict, reason = origin.verdict, f"made from {base}, {origin.reason}"
    return Descendant(child.id, base, relation, created, verdict, reason)


def _of_card(block: dict, relation: str) -> str:
    """What an unlearning card says, in a few words."""
    audit = block.get("audit")
    passed = f"audit {'passed' if audit.get('passed') else 'not passed'}" if isinstance(audit, dict) else "not audited"
    told = [f"its card says so (last request {_last_request(block) or 'without a date'}, {passed})"]
    if block.get("warnings"):
        told.append("and warns that it may not have")
    if relation == "adapter":
        told.append("with the adapter on; the base below it still holds it")
    return ", ".join(told)


def lineage_text(repo: str, found: Iterable[Descendant]) -> str:
    """A line a model, those that still hold it first, and a summary."""
    found = sorted(found, key=lambda one: (WORST.index(one.verdict), one.base != repo, one.name))
    if not found:
        return f"No model on the Hub names {repo} as its base. Copies whose cards do not say so are not seen."
    rows = [(one.verdict, one.name, one.relation, str(one.created or "-"), one.reason) for one in found]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    count = {verdict: sum(one.verdict == verdict for one in found) for verdict in (HOLDS, UNCLEAR)}
    told = f"{count[HOLDS]} of {len(found)} models still hold what had to go, by their cards"
    told += f"; {count[UNCLEAR]} are unclear" if count[UNCLEAR] else ""
    told += f" (the first {MOST} alone)" if len(found) >= MOST else ""
    return "\n".join(
        [*lines, "", f"{told}. Cards alone were read: no weights, and no copies whose cards do not name {repo}."]
    )
