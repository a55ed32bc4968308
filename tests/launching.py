"""Starting a script of the tests under one or several processes."""

import os
import sys

HERE = os.path.dirname(__file__)
CONFIGS = os.path.join(HERE, "..", "hf_uib", "cli", "accelerate_configs")


def unlearn_words(folder, where: str, *more) -> list[str]:
    """`hf-uib unlearn` of ``model`` and ``data`` in a folder, three steps long, to ``out``."""
    words = [
        "unlearn",
        "--model_name_or_path",
        folder / "model",
        "--dataset_name",
        folder / "data",
        "--forget_where",
        where,
    ]
    words += ["--max_steps", 3, "--output_dir", folder / "out", "--report_to", "none", "--use_cpu", *more]
    return list(map(str, words))


def command_for(
    script: str, processes: int, *arguments, config: str = "cpu_two_processes"
) -> tuple[list[str], dict[str, str]]:
    """Command and environment; several processes are started by accelerate, with one of the package's configurations."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "accelerate.commands.launch", "--config_file", os.path.join(CONFIGS, f"{config}.yaml")]
    command += [os.path.join(HERE, script), *map(str, arguments)]
    return command, os.environ | {
        "PYTHONPATH": f"{HERE}{os.pathsep}{os.path.join(HERE, '..')}",
        "OMP_NUM_THREADS": "1",
    }
