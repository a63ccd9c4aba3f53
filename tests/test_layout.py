"""The rooms and doors: who may import whom, what is packaged, what must never appear in the packages."""

import ast
import configparser
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ["modeling_moca", "trainers", "hub_cards", "examples", "tests", "benchmarks"]
MAY_IMPORT = {
    "modeling_moca": set(),
    "trainers": {"modeling_moca"},
    "hub_cards": {"modeling_moca"},
}
# conversion.py stays at home and reads safetensors itself.
TRAVELLING = {"torch", "transformers"}


def modules(room):
    return sorted((ROOT / room).rglob("*.py"))


def imports(path):
    """Return (module, level) of every import in a file, those inside functions included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module, node.level))
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_arrows_point_one_way(room):
    assert modules(room)
    for path in modules(room):
        for name, level in imports(path):
            target = (name or "").split(".")[0]
            if level == 0 and target in ROOMS:
                assert target in MAY_IMPORT[room] | {room}, f"{path.relative_to(ROOT)} imports {name}"


def test_remote_code_imports_nothing_else_and_relatively():
    travelling = [path for path in modules("modeling_moca") if path.name not in ("__init__.py", "conversion.py")]
    assert {path.stem for path in travelling} >= {
        "configuration_moca",
        "modeling_moca",
        "heads_moca",
        "processing_moca",
    }
    for path in travelling:
        for name, level in imports(path):
            if level:
                # The remote-code loader follows only `from .module import name`.
                assert level == 1 and name and "." not in name, f"{path.name}: from {'.' * level}{name}"
                assert (path.parent / f"{name}.py").is_file()
                assert name != "conversion"
            else:
                package = name.split(".")[0]
                assert package in TRAVELLING or package in sys.stdlib_module_names, f"{path.name} imports {name}"


def test_setup_lists_its_packages_and_nothing_else():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options"]["packages"].split() == ["modeling_moca", "trainers", "hub_cards"]
    # The Space is data: a folder to upload, in which no package of this project is known.
    folders = {path.parent.name for room in MAY_IMPORT for path in modules(room)} - {"space"}
    assert folders == set(MAY_IMPORT), "a sub-package would not be shipped"


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_packages_neither_print_nor_evaluate_nor_unpickle(room):
    for path in modules(room):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("print", "eval", "exec"), f"{path.name}:{node.lineno} {node.func.id}"
        assert not {name.split(".")[0] for name, level in imports(path) if level == 0} & {"pickle", "dill"}


def public_functions(tree, prefix=""):
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            yield from public_functions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield prefix + node.name, node


@pytest.mark.parametrize("path", modules("modeling_moca"), ids=lambda path: path.name)
def test_public_functions_tell_their_arguments_and_errors(path):
    for name, node in public_functions(ast.parse(path.read_text())):
        docstring = ast.get_docstring(node)
        assert docstring, f"{path.name}: {name} has no docstring"
        if isinstance(node, ast.ClassDef):
            continue
        arguments = [argument.arg for argument in node.args.args + node.args.kwonlyargs]
        arguments += [argument.arg for argument in (node.args.vararg, node.args.kwarg) if argument]
        untold = [argument for argument in arguments if argument not in ("self", "cls") and argument not in docstring]
        assert not untold, f"{path.name}: the docstring of {name} does not tell {untold}"
        if any(isinstance(inner, ast.Raise) for inner in ast.walk(node)):
            assert "Raises:" in docstring, f"{path.name}: the docstring of {name} does not tell what it raises"
