"""Which room of the code may import which: data flow one way, and no module imports one above it."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground floor up: a room (a folder, or a module that stands alone), and the rooms that it may import from.
PACKAGE = {
    "common": set(),
    "_pml": set(),
    "distributed": set(),
    "arithmetic": {"common", "_pml"},  # of the loss; it knows no tree
    "tree": {"common", "distributed"},  # it knows nothing of PML or of the loss
    "samplers": {"common", "distributed", "tree"},
    "inputs": {"common", "arithmetic", "tree"},
    "plots": {"common", "tree"},
    "miners": {"common", "_pml", "arithmetic", "tree", "inputs"},
    "refreshing": {"common", "_pml", "distributed", "tree", "samplers", "plots"},
    "losses": {"common", "_pml", "arithmetic", "inputs", "miners"},
    "hooks": {"common", "_pml", "distributed", "tree", "samplers", "refreshing"},
    "recipe": {"common", "_pml", "tree", "samplers", "miners", "losses", "hooks"},
    "checkpoint": {"common", "_pml", "samplers", "hooks"},
    "lightning": {"common", "samplers", "hooks"},
    "__init__": {"tree", "samplers", "miners", "losses", "hooks", "recipe"},
}
BENCHMARKS = {
    "common": set(),
    "data": set(),
    "methods": {"common"},
    "training": {"common", "data", "methods"},
    "outcomes": {"common", "data", "methods", "training"},
    "speed": {"common", "training", "outcomes"},
    "report": {"data", "methods", "outcomes"},
    "comparison": {"common", "data", "methods", "training", "outcomes", "report"},
    "commands": {"common", "data", "methods", "training", "outcomes", "speed", "report", "comparison"},
    "__main__": {"common", "training", "commands"},
    "__init__": set(),
}
both = pytest.mark.parametrize(
    "name, table", [("pml_htl", PACKAGE), ("benchmarks", BENCHMARKS)], ids=["pml_htl", "benchmarks"]
)


def sources(package):
    """The text of each module, by its dotted name below the package; that of a room itself is `room.__init__`."""
    folder = ROOT / package
    return {".".join(path.relative_to(folder).with_suffix("").parts): path.read_text() for path in folder.rglob("*.py")}


def imports(package, modules):
    """Which modules of the package each module imports, wherever in it the import stands."""
    found = {module: set() for module in modules}
    for module, text in modules.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                parents = [package, *module.split(".")][: -node.level] if node.level else []
                source = ".".join([*parents, *filter(None, [node.module])])
                names = [f"{source}.{alias.name}" for alias in node.names]  # modules, or what is in the module
            else:
                continue
            for name in names:
                below = name.split(".")[1:] if name.split(".")[0] == package else []
                known = (".".join([*below[:length], *end]) for length in (2, 1, 0) for end in ([], ["__init__"]))
                if below:
                    found[module].add(next(name for name in known if name in modules))
    return found


def room_of(module):
    return module.split(".")[0]


def upward(package, modules, table):
    """The imports that the table does not allow, as "module -> module"."""
    return sorted(
        f"{module} -> {other}"
        for module, others in imports(package, modules).items()
        for other in others
        if room_of(other) not in table[room_of(module)] | {room_of(module)}
    )


@both
def test_every_room_imports_only_from_those_below(name, table):
    assert upward(name, sources(name), table) == []


@both
def test_the_table_has_every_room_and_goes_one_way(name, table):
    modules = sources(name)
    assert {room_of(module) for module in modules} == table.keys()
    rooms = list(table)
    for number, allowed in enumerate(table.values()):
        assert allowed <= set(rooms[:number])
    # All that is allowed is used: the table tells how it is, not how it might be.
    used = {(room_of(module), room_of(other)) for module, others in imports(name, modules).items() for other in others}
    assert {(room, other) for room, allowed in table.items() for other in allowed} <= used


@both
def test_no_modules_import_each_other(name, table):
    list(graphlib.TopologicalSorter(imports(name, sources(name))).static_order())  # a CycleError names them


@pytest.mark.parametrize(
    "module, text",
    [
        ("common.labels", "from ..tree import ClassTree"),
        ("tree.linkage", "def lazily():\n    from ..arithmetic.hinge import hinge_sums"),
        ("arithmetic.hinge", "from .. import tree"),
        ("arithmetic.hinge", "import pml_htl.tree.nearest"),
        ("tree.statistics", "from .._pml import LpDistance"),
        ("samplers", "from .hooks import TreeRefresh"),
        ("miners", "from . import losses"),
        ("losses", "from pml_htl import HTL"),
    ],
)
def test_an_import_upward_is_found(module, text):
    assert len(upward("pml_htl", {**sources("pml_htl"), module: text}, PACKAGE)) == 1


def test_modules_that_import_each_other_are_found():
    modules = {**sources("pml_htl"), "tree.linkage": "from . import merging"}
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter(imports("pml_htl", modules)).static_order())


def test_few_modules_stand_outside_of_rooms():
    assert len(list((ROOT / "pml_htl").glob("*.py"))) <= 12
