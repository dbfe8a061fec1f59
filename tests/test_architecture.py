"""The law of imports, the tree of rooms and the names of classes are as docs/architecture.md tells them."""

from __future__ import annotations

import ast
import importlib.machinery
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import grimp
else:
    grimp = pytest.importorskip("grimp", reason="grimp needs Python 3.11")

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mechanex"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def graph_of(monkeypatch: pytest.MonkeyPatch, **options: Any) -> grimp.ImportGraph:
    """Who imports whom in this folder, wherever else the package is installed; the package's own file is left out,
    since Python runs it before any of its modules anyway."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "meta_path", [importlib.machinery.PathFinder])
        patch.setattr(sys, "path", [str(ROOT), *sys.path])
        for name in [name for name in sys.modules if name.partition(".")[0] == "mechanex"]:
            patch.delitem(sys.modules, name)
        graph = grimp.build_graph("mechanex", cache_dir=None, **options)
    for imported in graph.find_modules_directly_imported_by("mechanex"):
        graph.remove_import(importer="mechanex", imported=imported)
    return graph


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> grimp.ImportGraph:
    """Every import: at the top of a file, in functions, for types."""
    return graph_of(monkeypatch)


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> grimp.ImportGraph:
    """The imports that run, sooner or later."""
    return graph_of(monkeypatch, exclude_type_checking_imports=True)


# Imports


def orders() -> dict[str, list[list[str]]]:
    """The container of each order on the page, and its layers' names, with the sign between them in front."""
    places = re.findall(r"^In `([\w.]+)`.*?^```order\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return {
        container: [["+" if "+" in line else "|", *re.split(r" [|+] ", line)] for line in body.splitlines()]
        for container, body in places
    }


@pytest.mark.parametrize("container", ["mechanex", "mechanex.server", "mechanex.engine"])
def test_rooms_import_downwards_only(graph: grimp.ImportGraph, container: str) -> None:
    layers = [grimp.Layer(*names, independent=sign == "|") for sign, *names in orders()[container]]
    told = {name for _, *names in orders()[container] for name in names}
    there = {name.rpartition(".")[2] for name in graph.find_children(container)}
    assert told <= there, f"{container} has no {sorted(told - there)}"
    if container != "mechanex.engine":
        assert there == told, f"the order of {container} lacks {sorted(there - told)}"
    broken = graph.find_illegal_dependencies_for_layers(layers=layers, containers={container})
    ways = sorted(
        " → ".join([min(route.heads), *route.middle, min(route.tails)])
        for one in broken
        for route in one.routes
    )
    assert not ways, "imports that go up:\n" + "\n".join(ways)


def circles(graph: grimp.ImportGraph) -> Iterator[list[str]]:
    """A way round for each module that imports itself on one."""
    left = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    while left:
        done = [module for module, imported in left.items() if not imported & left.keys()]
        if not done:
            way = [min(left)]
            while way[-1] not in way[:-1]:
                way.append(min(left[way[-1]] & left.keys()))
            yield way[way.index(way[-1]) :]
            done = way[way.index(way[-1]) + 1 :]
        for module in done:
            del left[module]


def test_no_module_imports_itself_on_a_way_round(running: grimp.ImportGraph) -> None:
    found = [" → ".join(circle) for circle in circles(running)]
    assert not found, "circles:\n" + "\n".join(found)


def test_some_libraries_have_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of(monkeypatch, include_external_packages=True)
    (table,) = blocks(PAGE, "places")
    for library, *places in map(str.split, table.splitlines()):
        importers = graph.find_modules_that_directly_import(library) if library in graph.modules else set()
        elsewhere = sorted(one for one in importers if one.split(".")[1] not in places)
        assert importers and not elsewhere, f"{library} is imported by {elsewhere or 'nobody'}"


# The tree


def tree(text: str) -> set[Path]:
    """The folders and Python files of the tree in a page."""
    (block,) = [
        block for block in blocks(text, "text") if block.startswith("mechanex/") or "\nmechanex/" in block
    ]
    named, open_folders = set(), [ROOT]
    for line in block[block.index("mechanex/") :].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.match(r"(?:[\w.]+(?:/|\.py)\s+|[\w.]+(?:/|\.py)$)+", line.strip() + " ")
        assert names is not None, f"no folder or file begins the line {line!r}"
        for name in names.group().split():
            named.add(open_folders[depth] / name)
        open_folders[depth + 1 :] = [open_folders[depth] / names.group().split()[0]]
    return named


def rooms() -> set[Path]:
    """Folders of modules: of the package, the engine and the server."""
    around = (PACKAGE, PACKAGE / "engine", PACKAGE / "server")
    return {path.parent for folder in around for path in folder.glob("*/*.py")}


def test_the_tree_shows_every_room_and_nothing_else() -> None:
    named = tree(PAGE)
    missing = sorted(str(path.relative_to(ROOT)) for path in named if not path.exists())
    assert not missing, f"docs/architecture.md names what isn't there: {missing}"
    files = {path for path in PACKAGE.glob("*.py") if path.name != "__init__.py"}
    untold = sorted(str(path.relative_to(ROOT)) for path in (rooms() | files) - named)
    assert not untold, f"docs/architecture.md lacks {untold}"


def test_the_readmes_tree_is_a_part_of_it() -> None:
    named = tree((ROOT / "README.md").read_text(encoding="utf-8"))
    assert named <= tree(PAGE)
    assert {path for path in rooms() if path.parent == PACKAGE} - {PACKAGE / "_private"} <= named


# Names


def test_a_class_name_means_one_thing() -> None:
    places = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{path.relative_to(ROOT)}:{node.lineno}")
    twice = [f"{name}: {', '.join(where)}" for name, where in places.items() if len(where) > 1]
    assert not twice, "names of several classes:\n" + "\n".join(twice)


def test_no_test_asserts_on_the_clock() -> None:
    clocks = re.compile(r"\b(monotonic|perf_counter|time\.time)\(\) [-<>]|[<>]=? time\.\w+\(\)")
    found = [
        f"{path.name}:{node.lineno}"
        for path in sorted((ROOT / "tests").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert) and clocks.search(ast.unparse(node.test))
    ]
    assert not found, f"how long something takes is nothing that a busy machine can promise: {found}"
