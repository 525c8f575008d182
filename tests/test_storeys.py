"""The package's folders are storeys: an import points down the list in `STOREYS`, never up, and there is no circle.

An import for typing only, or within a function, counts like any other. docs/storeys.py draws the list.
"""

import ast
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
PACKAGE, PICTURE = ROOT / "fastnabla", ROOT / "docs" / "storeys.png"
STOREYS = (
    ("train", "sample", "evaluate", "export", "compare", "reproduce"),
    ("study",),
    ("comparison", "analytic"),
    ("evaluation",),
    ("training",),
    ("debug",),
    ("run",),
    ("cost",),
    ("methods",),
    ("metrics",),
    ("trajectories",),
    ("optim",),
    ("models",),
    ("prompts", "rewards"),
    ("distributed",),
    ("testbed",),
    ("config",),
    ("losses", "compat", "table_scheduler"),
    ("objective",),
    ("kernels",),
    ("transition",),
    ("scheduler_coefficients", "flow_matching_coefficients"),
    ("utils",),
)
HEIGHT = {name: -height for height, names in enumerate(STOREYS) for name in names}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py" and "kernels" not in path.relative_to(PACKAGE).parts
}


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastnabla."):
            module = node.module.removeprefix("fastnabla.")
            inner = {f"{module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else module for name in inner}
        elif isinstance(node, ast.ImportFrom) and node.module == "fastnabla":
            found |= {alias.name for alias in node.names} - {"__version__"}
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("fastnabla.")]
            found |= {name.removeprefix("fastnabla.") for name in names}
    return found


def storey(module: str) -> str:
    return module.partition(".")[0]


def test_every_module_has_a_storey():
    assert {storey(module) for module in MODULES} | {"kernels"} == set(HEIGHT)


@pytest.mark.parametrize("module", [module for module in MODULES if not module.endswith("__main__")])
def test_imports_point_down(module):
    """`__main__` of a folder is a command line, and may import what is above the folder."""
    own = storey(module)
    up = [name for name in imported(MODULES[module]) if storey(name) != own and HEIGHT[storey(name)] >= HEIGHT[own]]
    assert not up, f"{module} imports {', '.join(sorted(up))} from its own storey or one above"


@pytest.mark.slow
def test_no_circle():
    edges = {module: imported(path) & MODULES.keys() for module, path in MODULES.items()}
    while leaves := [module for module, below in edges.items() if not below & edges.keys()]:
        for module in leaves:
            del edges[module]
    assert not edges, f"circles among {', '.join(edges)}"


def in_words(storeys: Sequence[Sequence[str]]) -> str:
    return "; ".join(" ".join(names) for names in storeys)


def test_the_picture_shows_the_list():
    with Image.open(PICTURE) as image:
        assert image.text["storeys"] == in_words(STOREYS), "draw it again: python -m docs.storeys"
