"""Reading settings from the command line and from YAML, and errors in one line. Imports nothing heavy."""

import argparse
import gc
import io
import json
import linecache
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

EPILOG = """\
Settings may also stand in a file: --config FILE.yaml, one `name: value` a line; flags overrule it.
--debug without a value shows the traceback of an error."""
LAUNCH_EPILOG = """
--accelerate_config NAME starts the command under accelerate: cpu_two_processes, ddp, fsdp2, zero2, or a file of your own;
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
    parser.error = refuse  # type: ignore[method-assign]
    for action in parser._actions:
        if action.dest in lists:
            action.nargs, action.metavar = "+", lists[action.dest]
    given = _with_files(arguments, lists, {action.dest for action in parser._actions})
    try:
        return tuple(parser.parse_args_into_dataclasses(given))
    except Exception as error:  # whatever a library says about a setting
        if isinstance(error, (ValueError, OSError)) and "\n" not in str(error):
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"the settings do not work: {reason}") from error


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside each flag; description and epilog as they are written."""


def refuse(message: str):
    """As argparse's `error`, in one line."""
    raise ValueError(message)


def _with_files(arguments: list[str], lists: Iterable[str], known: set[str]) -> list[str]:
    """The arguments after the settings of the files they name, so that they overrule them."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.error = refuse  # type: ignore[method-assign]
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
            raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
        except Exception as error:  # a date that is none, a number of 5,000 digits, too deep a nesting
            raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings; write one `name: value` a line.")
    return settings, written


INTERRUPTED = "interrupted; what was written is whole. With --save_strategy steps a run can be resumed."
LONGEST = 600  # characters of a library's message
OUT_OF_MEMORY = "out of memory; lower --per_device_train_batch_size and --per_device_eval_batch_size, or free some."


def one_line_errors(function: Callable[[], object], debug: bool = False) -> None:
    """Call ``function``; whatever goes wrong is one line and exit status 1. Nothing is ever asked on the terminal.

    Args:
        debug: show the traceback instead; as does the environment variable HF_UIB_TRACEBACK=1.
    """
    stdin, sys.stdin = sys.stdin, io.StringIO()  # a library that asks gets no answer
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 is no reason to fail
    try:
        function()
    except (Exception, KeyboardInterrupt) as error:
        if (debug or os.environ.get("HF_UIB_TRACEBACK")) and isinstance(error, Exception):
            raise
        sys.exit(f"error: {in_one_line(error)}")
    finally:
        sys.stdin = stdin
        distributed = sys.modules.get("torch.distributed")
        if distributed and distributed.is_available() and distributed.is_initialized():
            gc.collect()  # the model goes before its process group, and that before the interpreter
            distributed.destroy_process_group()


def in_one_line(error: BaseException) -> str:
    """What went wrong. Our own messages as they are; of any other error also its type, and how to see where it came from."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    kind = type(error).__name__
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError":
        return OUT_OF_MEMORY
    text = " ".join(str(error).split())
    if _said_by_us(error):
        return text
    if len(text) > LONGEST:
        text = f"{text[: LONGEST - 4]} ..."
    if isinstance(error, OSError) and text:
        return text
    module = _raised_in(error)
    return f"{text or 'no message'} ({kind}{f' in {module}' if module else ''}; --debug shows more)"


def _last_frame(error: BaseException):
    last = None
    trace = error.__traceback__
    while trace is not None:
        last, trace = trace, trace.tb_next
    return last


def _raised_in(error: BaseException) -> str:
    """The package whose code raised an error."""
    last = _last_frame(error)
    return "" if last is None else str(last.tb_frame.f_globals.get("__name__", "")).partition(".")[0]


def _said_by_us(error: BaseException) -> bool:
    """Whether an error is a message of ours: a ValueError that a `raise` of hf_uib (or of the parser of settings) raised."""
    if not isinstance(error, ValueError) or isinstance(error, UnicodeError):
        return False
    last = _last_frame(error)
    if last is None:
        return True
    line = linecache.getline(last.tb_frame.f_code.co_filename, last.tb_lineno)
    raised = not line or re.match(r"\s*raise\b", line) is not None  # no source, no doubt
    return raised and _raised_in(error) == __name__.partition(".")[0]
