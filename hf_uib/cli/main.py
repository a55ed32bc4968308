"""`hf-uib`: finds the command and starts it, under accelerate where that is asked for. Imports nothing heavy."""

import argparse
import sys
from importlib import import_module, resources
from pathlib import Path

from .. import __version__
from .parser import one_line_errors, refuse

COMMANDS = {
    "unlearn": "make a fine-tuned classifier forget rows of its training data, or a pattern in them",
    "discover": "rows of a training set that teach a shortcut, where no attribute is labelled",
    "audit": "look for what is left of the forget set in any checkpoints",
    "demo": "a bias in real digits, unlearned and compared with retraining, in about a minute",
    "export": "the merged model as ONNX, compared with PyTorch's; its int8 too",
    "lineage": "models on the Hub that were made from one, and still hold what it had to forget",
    "app": "a page on this machine: a model before and after unlearning, on your own example",
}
LAUNCHED = ("unlearn", "audit", "demo")  # can run in several processes
CONFIGS = resources.files(__package__).joinpath("accelerate_configs")


def main(command: str | None = None) -> None:
    """Run the command line of this process; ``command`` is put before it, for scripts that are one command."""
    words = [command] if command is not None else []
    arguments, debug = split_debug([*words, *sys.argv[1:]])
    one_line_errors(lambda: dispatch(arguments), debug)


def dispatch(arguments: list[str]) -> None:
    """Start the command that ``arguments`` begin with.

    Raises:
        ValueError: no such command, or no such accelerate config.
    """
    commands = "\n".join(f"  {name:9}{what}" for name, what in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="hf-uib",
        description="Fine-tuned Transformers classifiers unlearn.",
        epilog=f"commands:\n{commands}\n\n`hf-uib COMMAND --help` lists the settings of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hf-uib {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")  # taken by split_debug
    parser.add_argument("command", nargs="?", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="settings of the command")
    given = parser.parse_args(arguments)
    if given.command is None:
        parser.print_help()
        return
    if given.command in LAUNCHED:
        launcher = argparse.ArgumentParser(prog=f"hf-uib {given.command}", add_help=False, allow_abbrev=False)
        launcher.error = refuse  # type: ignore[method-assign]
        launcher.add_argument("--accelerate_config")
        launcher.add_argument("--num_processes", type=int)
        wanted, given.arguments = launcher.parse_known_args(given.arguments)
        if wanted.accelerate_config is not None:
            launch(config_path(wanted.accelerate_config), wanted.num_processes, [given.command, *given.arguments])
            return
        if wanted.num_processes is not None:
            raise ValueError("--num_processes goes with --accelerate_config NAME; give both.")
    import_module(f".{given.command}", __package__).main(given.arguments)


def split_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """The arguments without a bare ``--debug``, and whether there was one. With a value it is a setting of Transformers."""
    bare = [
        word == "--debug" and (following is None or following.startswith("--") or following in COMMANDS)
        for word, following in zip(arguments, [*arguments, None][1:], strict=True)
    ]
    return [word for word, taken in zip(arguments, bare, strict=True) if not taken], any(bare)


def config_path(name: str) -> str:
    """Path of an accelerate config: a file, or the name of one that comes with the package."""
    if Path(name).is_file():
        return name
    known = sorted(entry.name.removesuffix(".yaml") for entry in CONFIGS.iterdir() if entry.name.endswith(".yaml"))
    if name not in known:
        raise ValueError(f"No accelerate config '{name}'; give a file, or one of {', '.join(known)}.")
    return str(CONFIGS.joinpath(f"{name}.yaml"))


def launch(config: str, num_processes: int | None, arguments: list[str]) -> None:
    """Start ``python -m hf_uib.cli ARGUMENTS`` in the processes of an accelerate config."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    words = ["--config_file", config, "--quiet"]
    if num_processes is not None:
        words += ["--num_processes", str(num_processes)]
    try:
        launch_command(launch_command_parser().parse_args([*words, "--module", "hf_uib.cli", *arguments]))
    except ChildFailedError:  # which has said what went wrong
        sys.exit(1)
    except SignalException:
        raise KeyboardInterrupt from None
