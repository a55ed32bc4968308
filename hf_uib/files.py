"""Writing whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

UNFINISHED = "_unfinished"  # no name in `_` is ever uploaded


@contextmanager
def whole(folder: str) -> Iterator[str]:
    """A folder to write to, whose entries take their places in ``folder`` when the block ends; after an error none of them does."""
    unfinished = os.path.join(folder, UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    os.makedirs(unfinished)
    try:
        yield unfinished
        for name in os.listdir(unfinished):
            target = os.path.join(folder, name)
            if os.path.isdir(target):
                shutil.rmtree(target)
            os.replace(os.path.join(unfinished, name), target)
    except SafetensorError as error:
        raise OSError(
            f"{folder} could not be written ({error}); what was there before is whole. Free space and try again."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
