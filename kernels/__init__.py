"""The objective's Triton kernels, installed as `fastnabla.kernels`; `README.md` beside this file is their guide.

One file an operation, to be read from top to bottom: the formula and the bytes it moves, the `@triton.jit` kernels, the
launcher, the `autograd.Function`, the public function. Importing this package does not import Triton; its modules do.
"""

if __name__ == "kernels":
    # Somebody with the repository's root on sys.path looks for Hugging Face's package of this name: search on behind
    # the root. If it is not installed, be empty and of version 0. Raising would stop transformers, which imports
    # whatever lies here to see its version; 0 is below any version that it accepts.
    import importlib.util
    import sys
    from importlib.machinery import PathFinder
    from pathlib import Path

    _root = Path(__file__).resolve().parent.parent
    _behind = 1 + max((i for i, entry in enumerate(sys.path) if Path(entry).resolve() == _root), default=-1)
    _genuine = PathFinder.find_spec(__name__, sys.path[_behind:])
    if _genuine and _genuine.loader:
        sys.modules[__name__] = importlib.util.module_from_spec(_genuine)
        _genuine.loader.exec_module(sys.modules[__name__])
    else:
        __path__, __version__ = [], "0"
