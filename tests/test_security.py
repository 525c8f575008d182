"""The package's source runs no code that comes with data, and reads no pickles."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [*sorted((ROOT / "fastnabla").rglob("*.py")), *sorted((ROOT / "kernels").rglob("*.py"))]
FORBIDDEN = {
    "eval": "runs code",
    "exec": "runs code",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "yaml.load": "runs code",
    "yaml.unsafe_load": "runs code",
    "torch.hub.load": "runs code from the network",
    "torch.jit.load": "runs code of the file",
    "joblib.load": "runs code",
    "pandas.read_pickle": "runs code",
    "….safe_globals": "widens what weights_only reads",
    "….add_safe_globals": "widens what weights_only reads",
}
REQUIRED = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}
"""Calls that need a keyword."""
REFUSED = {
    "trust_remote_code": True,
    "shell": True,
    "allow_pickle": True,
    "weights_only": False,
    "use_safetensors": False,
}
"""Keywords that no call may have with this value, or with one that is computed."""
CONFIGURATIONS = ("config_class", "CLIPConfig", "CLIPTokenizer", "tokenizer", "getattr(diffusers, name)")
"""What reads JSON files only. Every other from_pretrained reads weights."""
PICKLING = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
"""Modules of which nothing may be used but `ERROR`."""
ERROR = "pickle.UnpicklingError"


def dotted(node: ast.expr) -> str:
    """A name such as torch.load. Unparsing every node would take seconds."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ast.unparse(node) if isinstance(node, ast.Call) else "…"


def problems(source: str) -> Iterator[str]:
    """What in a file's source is not allowed, with its line."""
    for node in ast.walk(ast.parse(source)):
        where = f"line {getattr(node, 'lineno', 0)}: "
        if isinstance(node, ast.ImportFrom) and node.module in PICKLING:
            yield f"{where}from {node.module} import"
        if isinstance(node, ast.Import):
            renamed = [a.name for a in node.names if a.name in PICKLING and (a.name not in ERROR or a.asname)]
            yield from (f"{where}import {name}" for name in renamed)
        if isinstance(node, ast.Attribute) and dotted(node.value) in PICKLING and dotted(node) != ERROR:
            yield f"{where}{dotted(node)}"
        if not isinstance(node, ast.Call):
            continue
        name, keywords = dotted(node.func), {k.arg: k.value for k in node.keywords}
        constants = {k: v.value for k, v in keywords.items() if isinstance(v, ast.Constant)}
        if why := FORBIDDEN.get(name) or FORBIDDEN.get(f"….{name.rpartition('.')[2]}"):
            yield f"{where}{name} {why}"
        if name in REQUIRED and constants.get(REQUIRED[name][0]) is not REQUIRED[name][1]:
            yield f"{where}{name} without {REQUIRED[name][0]} = {REQUIRED[name][1]}"
        yield from (
            f"{where}{name} has {k}" for k, bad in REFUSED.items() if k in keywords and constants.get(k, bad) is bad
        )
        reader, _, method = name.rpartition(".")
        reads_weights = method == "from_pretrained" and not reader.endswith(CONFIGURATIONS)
        if reads_weights and constants.get("use_safetensors") is not True:
            yield f"{where}{name} without use_safetensors = True"


@pytest.mark.slow
def test_no_code_comes_with_data() -> None:
    found = {str(file.relative_to(ROOT)): list(problems(file.read_text(encoding="utf-8"))) for file in SOURCES}
    assert len(found) > 200
    assert not {file: each for file, each in found.items() if each}


@pytest.mark.parametrize(
    "line",
    [
        "eval(text)",
        "exec(text)",
        "from pickle import load",
        "import pickle as p",
        "import dill",
        "pickle.load(file)",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "torch.load(file, weights_only=flag)",
        "np.load(file)",
        "np.load(file, allow_pickle=True)",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=flag)",
        "subprocess.run(line, shell=True)",
        "os.system(line)",
        "yaml.load(text)",
        "Model.from_pretrained(folder)",
        "Model.from_pretrained(folder, use_safetensors=None)",
        "torch.serialization.add_safe_globals([f])",
    ],
)
def test_what_is_not_allowed_is_found(line: str) -> None:
    assert list(problems(line))


def test_what_is_allowed_is_not_found() -> None:
    allowed = (
        "import pickle",
        "try: pass\nexcept pickle.UnpicklingError: pass",
        "torch.load(file, weights_only=True)",
        "np.load(file, allow_pickle=False)",
        "network.eval()",
        "Model.from_pretrained(folder, use_safetensors=True)",
        "CLIPConfig.from_pretrained(folder)",
        "subprocess.run(words)",
    )
    assert not [line for line in allowed if list(problems(line))]
