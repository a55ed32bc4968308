"""The page of the standard sets: each recipe's command, what was published, and what was measured."""

from dataclasses import dataclass

import numpy as np

from .markdown import table
from .methods import METHODS
from .tables import TITLES, by_method, gaps, task_table
from .tasks import TASKS
from .tasks.standard import SETTINGS

RUN = ("original", "uib", "lora", "full", "retrained", "dfr")
RUN_REMOVAL = ("original", "uib", "lora", "full", "salun", "retrained")
MISSING = "not measured here"
SOURCES = {
    "DPE": "[To et al., ICML 2025](https://arxiv.org/abs/2505.23027)",
    "DFR": "[Kirichenko et al., ICLR 2023](https://arxiv.org/abs/2204.02937)",
    "AFR": "[Qiu et al., ICML 2023](https://github.com/AndPotap/afr)",
}
MODELS = {"waterbirds": "ResNet-50", "celeba": "ResNet-50", "civil-comments": "BERT", "multi-nli": "BERT"}


@dataclass(frozen=True)
class Published:
    """A published row: accuracy of the worst group on the test split, in percent.

    Attributes:
        source: of `SOURCES`.
        groups: what the group labels are used for.
        figures: by recipe.
        ours: the method here that does the same.
    """

    title: str
    source: str
    groups: str
    figures: dict[str, float]
    ours: str | None = None


def figures(waterbirds=None, celeba=None, multi_nli=None, civil_comments=None) -> dict[str, float]:
    """By recipe, without those that were not published."""
    found = {"waterbirds": waterbirds, "celeba": celeba, "multi-nli": multi_nli, "civil-comments": civil_comments}
    return {name: value for name, value in found.items() if value is not None}


PUBLISHED = [
    Published("ERM", "AFR", "not used in training", figures(72.6, 47.2, 67.9, 57.4), "original"),
    Published("ERM, the start of DPE", "DPE", "not used in training", figures(77.9, 66.5, 66.5, 69.4), "original"),
    Published("JTT", "AFR", "not used in training", figures(86.7, 81.1, 72.6, 69.3)),
    Published("AFR", "AFR", "not used in training", figures(90.4, 82.0, 73.4, 68.7)),
    Published("DFR", "DFR", "of the rows that the head is fitted on", figures(92.9, 88.3, 74.7, 70.1), "dfr"),
    Published("DPE", "DPE", "not used in training", figures(94.1, 84.6, 70.9, 68.9)),
    Published("DPE", "DPE", "of the validation split, to fit the heads", figures(None, 90.3, 75.3, 70.8)),
]
HEAD = """# Standard sets

Written by `python -m benchmarks report`. Each set is a recipe: one command, for a GPU and with access to the Hub. The data
comes from the Hub, or from a folder with the same columns (`--waterbirds FOLDER`). A plain `python -m benchmarks run` leaves
the recipes out. None was run where this page was written: tests run them on stand-ins of a few dozen rows with the same columns.

The checkpoint (*original*, in papers ERM) learns from the whole training split. *Retrained* learns from the retained rows alone,
and *DFR* fits a new head on them. No test row chooses anything. A method's settings are those of fashion-colour, unless it is
tuned on the validation split first: `python -m benchmarks tune --tasks waterbirds --methods lora full dfr`.

The published figures for Waterbirds and CelebA are of a ResNet-50; the recipes take a ViT-B/16. A figure of ours beside a
published one therefore compares methods and models at once.
"""
REMOVAL = """Compared by the average gap to the retrained model, in points: accuracy on forget set, retained rows and test split,
and the membership attack. This is the protocol of SalUn ([Fan et al., ICLR 2024](https://arxiv.org/abs/2310.12508)) on a
ResNet-18; its attack is *MIA-Efficacy*, where the gap here takes the AUC. For ViTs there are
[LetheViT](https://arxiv.org/abs/2508.01569) and [a benchmark](https://arxiv.org/abs/2602.20114). Their tables could not be read
here, so the column of published figures is empty.
"""
UNVERIFIED = """## What could not be checked here

The Hub cannot be reached from where this page was written.

- The columns were read off the cards and off public code that loads the sets: `grodino/waterbirds` (`image`, `label`, `place`),
  `flwrlabs/celeba` (`image`, `Blond_Hair`, `Male`, truth values; split `valid`), `nyu-mll/multi_nli` (`premise`, `hypothesis`,
  `label`), `uoft-cs/cifar10` (`img`, `label`), `uoft-cs/cifar100` (`img`, `fine_label`). In Waterbirds
  place 1 is water, as such code says; that label 1 is the waterbird is the usual coding, and was not seen.
- `google/civil_comments` has no identities. The recipe takes `pietrolesci/civilcomments-wilds`, configuration `raw`, a copy of
  WILDS's `all_data_with_identities.csv` (448,000 rows with a column `split`). Its card could be read in part: the columns
  `comment_text`, `split` and `toxicity`; the eight identities are WILDS's names. A missing column is refused by name.
- Which CivilComments groups a published figure is of: AFR takes WILDS's data and scripts, DPE the 16 finer groups of
  SubpopBench, as public code that repeats it says. DFR's could not be checked.
- Steps, batch sizes and learning rates are ordinary ones for these models, and were not tried.
- The table of AFR (with its ERM and JTT) was read off its repository. The figures of DFR and DPE were passed on by a reader of
  the papers, and only the start of DPE was found again, in public notes on it. Waterbirds has one figure of DPE; which use of the
  groups it belongs to could not be checked.
"""


def standard_sets_page(runs: list[dict]) -> list[str]:
    """The recipes in their order."""
    recipes = [name for name, spec in TASKS.items() if spec.recipe and not spec.regime_of]
    return [HEAD, *(line for name in recipes for line in section(name, runs)), UNVERIFIED]


def section(name: str, runs: list[dict]) -> list[str]:
    """A recipe's description, command, settings, published figures and runs."""
    spec, settings = TASKS[name], SETTINGS[name]
    removal = spec.kind == "removal"
    regimes = [regime for regime, other in TASKS.items() if other.regime_of == name]
    command = f"python -m benchmarks run --tasks {name} --methods {' '.join(RUN_REMOVAL if removal else RUN)}"
    commands = [command, *(command.replace(name, f'"{regime}"') for regime in regimes)]
    words = (
        f"Data: `{next(iter(spec.data.values()))}`. Model: `{list(spec.data.values())[1]}`. Steps: {settings['steps']} of the "
        f"checkpoint, {settings['unlearn_steps']} of each method, {settings['retrain_steps']} of the retrained model, "
        f"{settings['batch']} rows each; learning rate {settings['lr']:g} (all weights).\n"
    )
    lines = [f"## {name}\n", f"{spec.text}\n", "```bash", *commands, "```\n", words]
    lines += [REMOVAL] if removal and name == "cifar10-random" else []
    lines += removal_rows(name, runs) if removal else published_rows(name, runs)
    for task in (name, *regimes):
        if by_method(runs, task):
            lines += [f"### {task}, measured\n", *task_table(task, runs)]
    return lines


def measured(name: str, method: str | None, runs: list[dict]) -> str:
    """Worst-group accuracy of a method's runs in percent, mean ± standard deviation over seeds."""
    if method is None:
        return "-"
    mine = by_method(runs, name).get(method)
    if not mine:
        return MISSING
    values = [100 * run["worst_group_accuracy"] for run in mine]
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.1f}"


def published_rows(name: str, runs: list[dict]) -> list[str]:
    """Accuracy of the worst group, published and ours."""
    rows = [
        [
            row.title,
            f"{row.figures[name]:.1f}",
            measured(name, row.ours, runs),
            MODELS[name],
            row.groups,
            SOURCES[row.source],
        ]
        for row in PUBLISHED
        if name in row.figures
    ]
    there = {row.ours for row in PUBLISHED}
    rows += [[METHODS[m].title, "-", measured(name, m, runs), "", "", ""] for m in RUN if m not in there]
    header = [TITLES["worst_group_accuracy"] + ", %", "published", "ours", "published model", "group labels", "source"]
    return table(header, rows)


def removal_rows(name: str, runs: list[dict]) -> list[str]:
    """Average gap to the retrained model, a column for each share that goes."""
    tasks = [name, *(regime for regime, spec in TASKS.items() if spec.regime_of == name)]

    def gap(task: str, method: str) -> str:
        of = by_method(runs, task)
        found = gaps(of.get(method, []), of.get("retrained", []))
        return f"{np.mean(found):.2f}" if found else MISSING

    rows = [[METHODS[m].title, "-", *(gap(task, m) for task in tasks)] for m in RUN_REMOVAL if m != "retrained"]
    return table(["average gap, points", "published", *(f"ours, {share}" for share in ("10%", "50%"))], rows)
