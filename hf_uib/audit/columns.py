"""What the tables show: heading and direction of each figure, by key."""

COLUMNS = {
    "accuracy": ("accuracy", "higher"),
    "conflicting_accuracy": ("bias-conflicting accuracy", "higher"),
    "follow_rate": ("follow rate", "lower"),
    "cramers_v": ("Cramér's V", "lower"),
    "worst_group_accuracy": ("worst group", "higher"),
    "forget_accuracy": ("accuracy, forget set", "that of the retrained model"),
    "retain_accuracy": ("accuracy, retained set", "that of the retrained model"),
    "flip_rate": ("counterfactual flip rate", "lower"),
    "seconds": ("seconds", "lower"),
}
