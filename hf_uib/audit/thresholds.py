"""The limits of the checks, and how much is looked at."""

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class AuditThresholds:
    """Limits of the audit's checks (named after them), and how much it looks at; the same for every task.

    "Way back": 0 is the retrained model's value, 1 the value before unlearning.

    Attributes:
        unchanged: relative distance of the logits, under which the model is the reference.
        encoder_untouched: relative distance of the last block's output, under which only the head was changed.
        logits_shifted: fraction of the logits' variance that those of the reference may explain.
        bias_remains, membership_remains, head_refit: fraction of the way back.
        bias_difference, auc_difference, refit_difference: what reference and retrained models must differ by for these three
            to judge by the way back; where they do not, the check fires if the model is above both by more.
        bias_reversed: accuracy where attribute and label agree may be this much below that where they do not.
        over_unlearned: AUC below the retrained model's.
        accuracy_lost: accuracy below that of the reference and of the retrained models.
        collapsed: fraction of the usual classes, at or under which the model has collapsed.
        usual_predictions: predictions of a class on the test set, by the reference and every retrained model, that make it usual.
        largest_class: how much more often the most frequent class may be predicted than by them.
        group_harmed: a group's accuracy below both, beyond the whole test set's.
        min_group_rows: test rows, under which a group is left out.
        relearns_faster: fraction of the retrained model's steps until half of the bias is back.
        comes_back_compressed: fraction of the way back that rounding or pruning may give.
        attribute_association: Cramér's V of attribute and label on the forget set, from which on the attribute stands for classes.
        min_rows: forget and test rows, under which most checks are not trusted.
        forget_rows, retain_rows, test_rows: rows looked at.
        resamples: bootstrap draws of the intervals.
        refit_fraction, refit_rows: of the forget set, for the re-fitted head: a fraction, and at least so many rows.
        probe_rows: test rows of the probes.
        relearning_steps: where the bias is measured, increasing.
        relearning_draws: of the rows, over which is averaged.
        relearning_fraction, relearning_rows: of the forget set that is shown again: a fraction, and at least so many rows.
        relearning_batch_size, relearning_rate: of AdamW.
        scales: multiples of what unlearning did to the weights.
        rmia_offset: the ``a`` of RMIA, by which a model that saw a row is inferred from those that did not.
    """

    unchanged: float = 1e-3
    encoder_untouched: float = 1e-3
    logits_shifted: float = 0.98
    bias_remains: float = 0.5
    membership_remains: float = 0.5
    head_refit: float = 0.7
    bias_difference: float = 0.02
    auc_difference: float = 0.03
    refit_difference: float = 0.05
    bias_reversed: float = 0.05
    over_unlearned: float = 0.05
    accuracy_lost: float = 0.08
    collapsed: float = 0.5
    largest_class: float = 0.4
    usual_predictions: int = 5
    group_harmed: float = 0.2
    min_group_rows: int = 20
    relearns_faster: float = 0.5
    comes_back_compressed: float = 0.25
    attribute_association: float = 0.3
    min_rows: int = 30
    forget_rows: int = 1000
    retain_rows: int = 1000
    test_rows: int = 5000
    resamples: int = 500
    refit_fraction: float = 0.02
    refit_rows: int = 50
    probe_rows: int = 2000
    relearning_steps: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32, 64)
    relearning_draws: int = 3
    relearning_fraction: float = 0.01
    relearning_rows: int = 16
    relearning_batch_size: int = 32
    relearning_rate: float = 1e-4
    scales: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    rmia_offset: float = 0.3

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            smallest = 1 if field.type in ("int", int) else 0
            for number in value if isinstance(value, tuple) else (value,):
                if not number >= smallest:
                    raise ValueError(f"AuditThresholds: {field.name} is {value}; it must be at least {smallest}.")
        if list(self.relearning_steps) != sorted(set(self.relearning_steps)) or not self.relearning_steps:
            raise ValueError(f"AuditThresholds: relearning_steps {self.relearning_steps} must increase.")

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)
