"""Reading settings from the command line and from YAML, and errors in one line. Imports nothing heavy."""

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

EPILOG = """\
Settings may also stand in a file: --config FILE.yaml, one `name: value` a line; flags overrule it.
--debug without a value shows the traceback of an error."""
LAUNCH_EPILOG = """
--accelerate_config NAME starts the command under accelerate: cpu_two_processes, ddp, zero2, or a file of your own;
--num_processes N overrules the number of processes in it."""
TEXTS = ("what", "why", "due", "reference")  # taken as written: 0017 is a file number, and `no` an answer
PERSONS = ("who", "name", "email", "requester", "person")  # never stored


def parse(
    command: str,
    description: str | None,
    arguments: list[str],
    *kinds: Any,
    lists: dict[str, str | None],
    launched: bool = True,
    **defaults,
) -> tuple:
    """One object of each dataclass in ``kinds``, from ``arguments`` and the YAML files that ``--config`` or ``--request`` name.

    Args:
        command: of `hf-uib`, for the usage line.
        description: shown by ``--help``.
        arguments: the words after the command.
        lists: flags that take several values, with what ``--help`` calls one (None: the flag's own name). ``--flag A B``; a flag
            given twice is refused.
        launched: accelerate can start the command.
        defaults: in place of those of the dataclasses.

    Raises:
        ValueError: in one line, what is wrong with a setting.
    """
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        kinds,
        prog=f"hf-uib {command}",
        description=description,
        epilog=EPILOG + (LAUNCH_EPILOG if launched else ""),
        formatter_class=_HelpFormatter,
    )
    parser.set_defaults(**defaults)
    parser.error = _refuse  # type: ignore[method-assign]
    for action in parser._actions:
        if action.dest in lists:
            action.nargs, action.metavar = "+", lists[action.dest]
    given = _with_files(arguments, lists, {action.dest for action in parser._actions})
    try:
        return tuple(parser.parse_args_into_dataclasses(given))
    except Exception as error:  # whatever a library says about a setting
        if isinstance(error, (ValueError, OSError)) and "\n" not in str(error):
            raise
        raise ValueError(f"the settings do not work: {str(error).partition(chr(10))[0]}") from error


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside each flag; description and epilog as they are written."""


def _refuse(message: str):
    raise ValueError(message)


def _with_files(arguments: list[str], lists: Iterable[str], known: set[str]) -> list[str]:
    """The arguments after the settings of the files they name, so that they overrule them."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.error = _refuse  # type: ignore[method-assign]
    early.add_argument("--config")
    early.add_argument("--request")
    files, given = early.parse_known_args(arguments)
    for name in lists:
        if sum(entry.partition("=")[0] == f"--{name}" for entry in given) > 1:
            raise ValueError(f"--{name} is given more than once; write --{name} A B.")
    for path in (files.request, files.config):
        if path is not None:
            given = flags_of(path, known) + given
    return given if files.request is None else [*given, "--request", files.request]


def flags_of(path: str, known: set[str]) -> list[str]:
    """The settings of a YAML file as flags, so that they are read and checked as those of the command line.

    Args:
        known: names of settings.

    Raises:
        ValueError: the file is no YAML, has a setting that is not known, or says who asks.
    """
    settings, written = _read_yaml(path)
    flags = []
    for name, value in settings.items():
        if name in PERSONS:
            raise ValueError(
                f"{path} has {name!r}: who asks is not stored; leave it out and use `reference` for your file number."
            )
        if name not in known:
            raise ValueError(f"{path} has a setting {name!r} that is not known; --help lists them.")
        if name in TEXTS and value is not None:
            value = written[str(name)]
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{name}={json.dumps(value, default=str) if isinstance(value, dict) else value}")
    return flags


def _read_yaml(path: str) -> tuple[dict, dict]:
    """The entries of a file as values, and as they are written."""
    import yaml

    with open(path, encoding="utf-8") as file:
        try:
            content = file.read()
            settings, written = yaml.safe_load(content), yaml.load(content, yaml.BaseLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no YAML: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings; write one `name: value` a line.")
    return settings, written


def one_line_errors(function: Callable[[], object], debug: bool = False) -> None:
    """Call ``function``; what is wrong with the user's input is one line and exit status 1.

    Args:
        debug: show the traceback instead; as does the environment variable HF_UIB_TRACEBACK=1.
    """
    try:
        function()
    except (ValueError, OSError, KeyError) as error:
        if debug or os.environ.get("HF_UIB_TRACEBACK"):
            raise
        sys.exit(f"error: {error.args[0] if isinstance(error, KeyError) else error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted; what was written is whole. With --save_strategy steps a run can be resumed.")
    finally:
        distributed = sys.modules.get("torch.distributed")
        if distributed and distributed.is_available() and distributed.is_initialized():
            gc.collect()  # the model goes before its process group, and that before the interpreter
            distributed.destroy_process_group()
