"""What the scripts share: reading the command line, and errors in one line. Imports nothing heavy."""

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable

TEXTS = ("what", "why", "due", "reference")  # 0017 is a file number, and no an answer


def parse(doc: str, *kinds: type, lists: dict[str, str | None], **defaults) -> tuple:
    """One object of each dataclass in ``kinds``, from the command line or from ``--config file.yaml`` (or ``--request``).

    Args:
        doc: the script's docstring; its first paragraph is shown by ``--help``.
        lists: flags that take several values, with what ``--help`` calls one (None: the flag's own name). ``--flag A B``; a flag
            given twice is refused.
        defaults: in place of those of the dataclasses.
    """
    from transformers import HfArgumentParser

    parser = HfArgumentParser(kinds, description=doc.partition("\n\n")[0])
    parser.set_defaults(**defaults)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    early.add_argument("--request")
    early.error = parser.error = _refuse  # type: ignore[method-assign]
    for action in parser._actions:
        if action.dest in lists:
            action.nargs, action.metavar = "+", lists[action.dest]
    found, given = early.parse_known_args()
    for name in lists:
        if sum(entry.partition("=")[0] == f"--{name}" for entry in given) > 1:
            raise ValueError(f"--{name} is given more than once; write --{name} A B.")
    known = {action.dest for action in parser._actions}
    for path in (found.request, found.config):
        if path is not None:
            given = _flags_of(path, known) + given
    if found.request is not None:
        given += ["--request", found.request]
    try:
        return parser.parse_args_into_dataclasses(given)
    except Exception as error:  # whatever a library says about a setting
        if isinstance(error, (ValueError, OSError)) and "\n" not in str(error):
            raise
        raise ValueError(f"the settings do not work: {str(error).partition(chr(10))[0]}") from error


def _refuse(message: str):
    raise ValueError(message)


def _flags_of(path: str, known: set[str]) -> list[str]:
    """The settings of a YAML file as flags, so that they are read and checked as those of the command line, which overrule them."""
    import yaml

    with open(path, encoding="utf-8") as file:
        try:
            content = file.read()
            settings, written = (
                yaml.safe_load(content),
                yaml.load(content, yaml.BaseLoader),
            )  # as values, and as written
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no YAML: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings; write one `name: value` a line.")
    flags = []
    for name, value in settings.items():
        if name in ("who", "name", "email", "requester", "person"):
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


def run(main: Callable[[], None]) -> None:
    """Call ``main``; what is wrong with the user's input is one line and exit status 1 (HF_UIB_TRACEBACK=1 shows more)."""
    try:
        main()
    except (ValueError, OSError, KeyError) as error:
        if os.environ.get("HF_UIB_TRACEBACK"):
            raise
        sys.exit(f"error: {error.args[0] if isinstance(error, KeyError) else error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted; what was written is whole. With --save_strategy steps a run can be resumed.")
    finally:
        distributed = sys.modules.get("torch.distributed")
        if distributed and distributed.is_available() and distributed.is_initialized():
            gc.collect()  # the model goes before its process group, and that before the interpreter
            distributed.destroy_process_group()
