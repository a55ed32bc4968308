"""`hf-uib audit`: audit any checkpoints."""

import os

from ..data.reading import image_column, load_processor, load_splits, split_forget, split_of, with_class_ids
from ..inference import processes
from .unlearn import quiet


def audit(script):
    """Audit the checkpoints of ``scripts/audit.py``; prints and returns the `AuditReport`."""
    from ..audit.report import audit_model, loaded

    quiet()
    model = loaded(script.model)
    reference = loaded(script.reference) if script.reference else None
    classes = (model if reference is None else reference).config
    splits = load_splits(script.dataset_name, script.dataset_config_name)
    train = with_class_ids(split_of(splits, script.train_split), classes)
    test = with_class_ids(split_of(splits, script.test_split), classes)
    if not script.forget_where:
        raise ValueError("--forget_where is missing; say which rows were to be forgotten, as COLUMN=VALUE.")
    forget, retain = split_forget(train, script.forget_where, script.train_split)
    report = audit_model(
        model,
        reference_model=reference,
        forget_dataset=forget,
        retain_dataset=retain if len(retain) else None,
        test_dataset=test,
        bias_column=script.bias_column,
        retrained_model=list(script.retrained),
        processing_class=load_processor(script.reference or script.model, picture=image_column(train) is not None),
        example_column=script.example_column,
        deep=script.deep,
        seed=script.seed,
    )
    if processes().is_main_process:
        os.makedirs(script.output_dir, exist_ok=True)
        report.to_json(os.path.join(script.output_dir, "report.json"))
        report.plot(script.output_dir)
        print(f"\n{report}\n\nreport.json and figures: {script.output_dir}")
    return report
