"""What is compared: a file here with a function under `register_method` is a method.

Each rule is derived anew from its paper; no published code was used. All weights are trained unless said.
"""

from ..registry import METHODS, Budget, MethodSpec, grid, import_every_module, register_method

__all__ = ["METHODS", "Budget", "MethodSpec", "grid", "register_method"]

import_every_module(__name__, __path__)
