"""What the scripts share: reading the command line, and errors in one line. Imports nothing heavy."""

import gc
import os
import sys
from collections.abc import Callable


def parse(doc: str, *kinds: type, lists: dict[str, str | None], **defaults) -> tuple:
    """One object of each dataclass in ``kinds``, from the command line or from ``--config file.yaml``.

    Args:
        doc: the script's docstring; its first paragraph is shown by ``--help``.
        lists: flags that take several values, with what ``--help`` calls one (None: the flag's own name). ``--flag A B`` and
            one flag for each value both work.
        defaults: in place of those of the dataclasses.
    """
    from transformers import HfArgumentParser

    parser = HfArgumentParser(kinds, description=doc.partition("\n\n")[0])
    parser.set_defaults(**defaults)
    for action in parser._actions:
        if action.dest in lists:
            action.nargs, action.metavar = "+", lists[action.dest]
    if "--config" in sys.argv:
        return parser.parse_yaml_file(sys.argv[sys.argv.index("--config") + 1])
    return parser.parse_args_into_dataclasses()


def run(main: Callable[[], None]) -> None:
    """Call ``main``; what is wrong with the user's input is one line and exit status 1 (HF_UIB_TRACEBACK=1 shows more)."""
    try:
        main()
    except (ValueError, OSError, KeyError) as error:
        if os.environ.get("HF_UIB_TRACEBACK"):
            raise
        sys.exit(f"error: {error.args[0] if isinstance(error, KeyError) else error}")
    finally:
        distributed = sys.modules.get("torch.distributed")
        if distributed and distributed.is_available() and distributed.is_initialized():
            gc.collect()  # the model goes before its process group, and that before the interpreter
            distributed.destroy_process_group()
