"""The objective's Triton kernels, installed as `fastnabla.kernels`. See `README.md` in this folder.

Each operation has one file, which reads from top to bottom: the formula and the bytes it moves, the `@triton.jit` kernels,
the launcher, the `autograd.Function`, the public function. Importing this package does not import Triton; its modules do.
"""

if __name__ == "kernels":
    # The repository's root is on sys.path, and the caller wants Hugging Face's package of this name: continue the search
    # behind the root. If that package is not installed, become an empty package of version 0. Raising would break
    # transformers, which imports whatever it finds here to read its version; it accepts no version as low as 0.
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
