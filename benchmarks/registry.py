"""What can be run: tasks and methods by name, filled by the decorators in `benchmarks.tasks` and `benchmarks.methods`."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from itertools import product
from pkgutil import iter_modules

from hf_uib.metrics import bias_row

BIAS = {"conflicting_accuracy": 1, "follow_rate": -1, "accuracy": 1}
KINDS = ("bias", "removal")
GROUPS = ("original", "fine-tuning", "unlearning", "debiasing", "uib", "oracle")  # also the order of the tables' rows


@dataclass
class Budget:
    """Optimizer steps with linear warm-up (5%) and decay, retained rows per step, peak learning rate, seed of every draw.

    Attributes:
        output_dir: where a trainer may write.
    """

    steps: int
    batch_size: int
    learning_rate: float
    seed: int = 0
    output_dir: str = ".bench"


@dataclass(frozen=True)
class TaskSpec:
    """A task of the benchmark.

    Attributes:
        make: gives the `hf_uib.cli.digits.Task`; takes ``seed`` and the paths named in ``data``. The first paragraph of its
            docstring stands on the task's page.
        data: options of the command line with the task's data and checkpoints, and their defaults.
        kind: ``bias`` (judged by the test set's bias) or ``removal`` (by the gap to the retrained model).
        labels_wrong: whether the forget set's labels are wrong, so that more of a method is better than under a bias.
        regime_of: the task of which this is another setting; not ranked, and tuned where that is.
        tuned_on: another task whose settings the methods take over.
        tuning_seeds: of the validation folds on which the methods are tuned, by their mean score.
        measure: of a test set's logits, labels and attributes; by default `hf_uib.metrics.bias_row`.
        ranked_by: the figures by which the methods are ranked on it, and 1 where more is better, -1 where less is.
        shown: the figures of its page, by key; by default those of its kind.
        recipe: whether it is a standard set to be run by name alone: it is in no table but its own (see `suite`).
    """

    name: str
    make: Callable
    data: dict[str, str] = field(default_factory=dict)
    kind: str = "bias"
    labels_wrong: bool = False
    regime_of: str | None = None
    tuned_on: str | None = None
    tuning_seeds: tuple[int, ...] = (100,)
    measure: Callable = bias_row
    ranked_by: dict[str, int] = field(default_factory=lambda: dict(BIAS))
    shown: tuple[str, ...] = ()
    recipe: bool = False

    @property
    def text(self) -> str:
        """The docstring of the function that makes it; its pages quote it."""
        return inspect.getdoc(self.make.func if isinstance(self.make, partial) else self.make) or ""

    @property
    def about_an_attribute(self) -> bool:
        """Whether it is judged as the bias tasks are whose attribute gives the label away."""
        return self.kind == "bias" and self.ranked_by == BIAS

    @property
    def wrong(self) -> bool:
        """Whether methods are tuned over their `MethodSpec.wrong_grid`: the forget set's labels are wrong, or its rows go."""
        return self.labels_wrong or self.kind == "removal"

    @property
    def tuning_task(self) -> str:
        """The task on whose validation fold the methods are tuned."""
        return self.tuned_on or self.regime_of or self.name


@dataclass(frozen=True)
class MethodSpec:
    """A row of the tables.

    Attributes:
        title: as it is printed.
        train: ``train(model, task, budget, **setting)``: the trained model, or a pair of it and of what else to record.
        group: one of `GROUPS`; ``original`` and ``oracle`` are not ranked.
        grid: settings to tune over; ``rate`` in them is a factor on the learning rate. One entry: not tuned.
        wrong_grid: another grid for the tasks with `TaskSpec.wrong`.
        learning_rate: the peak rate, instead of the task's for all weights.
        hosts: for UIB with another method inside, that method.
        needs_attribute: of the retained rows. kinds: of tasks it is run on.
        starts_from: ``original``, the checkpoint to unlearn, or ``start``, the model that the checkpoint was trained from.
        one_shot: takes no optimizer steps.
        unranked: a variant, shown only.
    """

    name: str
    title: str
    train: Callable
    group: str = "unlearning"
    grid: list[dict] = field(default_factory=lambda: [{}])
    wrong_grid: list[dict] | None = None
    learning_rate: float | None = None
    hosts: str | None = None
    needs_attribute: bool = False
    kinds: tuple[str, ...] = KINDS
    starts_from: str = "original"
    one_shot: bool = False
    unranked: bool = False

    @property
    def ranked(self) -> bool:
        """Whether it takes part in the ranks: no oracle, no variant, no method inside UIB."""
        return self.group not in ("original", "oracle") and not self.hosts and not self.unranked


TASKS: dict[str, TaskSpec] = {}
METHODS: dict[str, MethodSpec] = {}


def suite() -> dict[str, TaskSpec]:
    """The tasks that are run, tuned and compared unless others are named: all but the recipes."""
    return {name: spec for name, spec in TASKS.items() if not spec.recipe}


def register_task(name: str, **described) -> Callable:
    """Decorator: the function makes the task ``name``. Keywords as in `TaskSpec`."""

    def register(make: Callable) -> Callable:
        place = lambda spec: (spec.recipe, spec.regime_of or "", KINDS.index(spec.kind))
        _add(TASKS, TaskSpec(name, make, **described), place)
        return make

    return register


def register_method(name: str, title: str, **described) -> Callable:
    """Decorator: the function is the method ``name``. Keywords as in `MethodSpec`."""

    def register(train: Callable) -> Callable:
        _add(METHODS, MethodSpec(name, title, train, **described), lambda spec: GROUPS.index(spec.group))
        return train

    return register


def _add(table: dict, spec, place: Callable) -> None:
    """Put an entry into its place in the order of the tables."""
    if spec.name in table:
        raise ValueError(f"{spec.name} is registered twice.")
    table[spec.name] = spec
    ordered = sorted(table.items(), key=lambda entry: place(entry[1]))
    table.clear()
    table.update(ordered)


def grid(**values: list) -> list[dict]:
    """Every combination of the values, as settings."""
    return [dict(zip(values, chosen)) for chosen in product(*values.values())]


def import_every_module(package: str, path) -> None:
    """Run the decorators of a package."""
    for module in iter_modules(path):
        import_module(f"{package}.{module.name}")
