"""Methods x tasks x seeds, one JSON line a cell; cells that are there are skipped. Tables and figures come from the lines alone.

python scripts/benchmark.py --suite smoke             # a minute: every method on digits for ten steps, to a scratch file
python scripts/benchmark.py --tune --fashion_mnist ../shared/data/fashion_mnist ...   # the baselines' grids, on validation
python scripts/benchmark.py --fashion_mnist ../shared/data/fashion_mnist ...          # the cpu suite: hours on two cores
python scripts/benchmark.py --suite gpu               # step time and memory at ViT-B and BERT-base size in bf16
python scripts/benchmark.py --cost | --processes | --scaling | --audit  # a step, one and two processes, the statistics pass; fakes
python scripts/benchmark.py --research                # what the defaults rest on, and what was tried without gain
python scripts/benchmark.py --scale                   # one process and two, kills and resumes, memory of a million rows
python scripts/benchmark.py --truth                   # probes, a new head, relearning and rounded weights of every method
python scripts/benchmark.py --lifecycle               # three requests one after the other, an audit after each, one undone
python scripts/benchmark.py --report
"""

import argparse
import os
import tempfile

from bench import audits, cells, cost, lifecycle, report, research, scale, truth


def smoke(options) -> None:
    """Every method on digits-colour, seed 0, ten steps each, to a scratch file."""
    options.tasks, options.seeds = ["digits-colour"], [0]
    with tempfile.TemporaryDirectory() as folder:
        options.cache = folder
        path = os.path.join(folder, "results.jsonl")
        cells.run(options, lambda task, method: cells.METHODS[method].grid[0], path, steps=10)
        print("\n".join(report.task_table("digits-colour", cells.read(path))))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=("smoke", "cpu", "gpu"), default="cpu", help="what to run")
    parser.add_argument("--tasks", nargs="+", default=list(cells.TASKS), choices=cells.TASKS, help="tasks to run")
    parser.add_argument(
        "--methods", nargs="+", default=list(cells.METHODS), choices=cells.METHODS, help="methods to run"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of split, attribute and training"
    )
    parser.add_argument(
        "--fashion_mnist", default="zalando-datasets/fashion_mnist", help="folder or Hub id of fashion_mnist"
    )
    parser.add_argument("--airline_tweets", default="airline_tweets", help="folder or Hub id of airline_tweets")
    parser.add_argument(
        "--minilm", default="sentence-transformers/all-MiniLM-L6-v2", help="checkpoint for the text task"
    )
    parser.add_argument("--cache", default=".bench", help="folder for checkpoints")
    parser.add_argument("--tune", action="store_true", help="run the baselines' grids on the validation fold")
    parser.add_argument("--cost", action="store_true", help="measure step time and memory instead")
    parser.add_argument("--scaling", action="store_true", help="measure how the statistics pass grows")
    parser.add_argument("--processes", action="store_true", help="measure throughput under one and two processes")
    parser.add_argument("--cost_cell", nargs=4, help="used by --cost: variant, model, retained and forget examples")
    parser.add_argument("--audit", action="store_true", help="audit planted fakes and retrained models instead")
    parser.add_argument("--research", action="store_true", help="vary one setting at a time, on validation folds")
    parser.add_argument("--scale", action="store_true", help="compare processes, kill and resume, measure memory")
    parser.add_argument("--memory_cell", type=int, help="used by --scale: rows of each set")
    parser.add_argument("--truth", action="store_true", help="probe, relearn and round every method's model")
    parser.add_argument("--lifecycle", action="store_true", help="three requests in a row, and one undone")
    parser.add_argument("--report", action="store_true", help="write the tables from the results")
    options = parser.parse_args()
    if options.cost_cell:
        variant, model, retain, forget = options.cost_cell
        cost.cost_cell(variant, model, int(retain), int(forget), options)
    elif options.memory_cell:
        scale.memory_cell(options.memory_cell, options)
    elif options.scale:
        scale.run_scale(options)
    elif options.cost or options.suite == "gpu":
        cost.run_cost(options)
    elif options.processes:
        cost.run_processes(options)
    elif options.scaling:
        cost.run_scaling(options)
    elif options.audit:
        audits.run_audit(options)
    elif options.research:
        research.run_research(options)
    elif options.truth:
        truth.run_truth(options)
    elif options.lifecycle:
        lifecycle.run_lifecycle(options)
    elif options.report:
        report.write_report()
    elif options.suite == "smoke":
        smoke(options)
    elif options.tune:
        cells.tune(options)
    else:
        cells.run(options)


if __name__ == "__main__":
    main()
