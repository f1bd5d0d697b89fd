"""Sizes and floors of the source tree: ``python tools/house.py`` prints them, ``tests/test_house.py`` checks them."""

from __future__ import annotations

import ast
import itertools
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "unisono"

FLOORS: dict[str, int] = {
    "errors": 0, "version": 0, "system": 0,
    "tree": 1, "assignment": 1, "order": 1, "world": 1,
    "layout": 2, "collective": 2,
    "sync": 3,
    "replica": 4,
    "data": 5, "checkpoint": 5, "guard": 5, "observe": 5,
    "training": 6,
    "elastic": 7,
    "launch": 8,
    "verify": 9, "doctor": 9, "report": 9,
}  # fmt: skip
BESIDE = {"integrations", "testing", "demos", "__init__", "__main__"}
"""These may import from any floor; no floor imports them, but for the command, which names what it starts."""

READING = ("tree.py", "layout.py", "collective/base.py", "sync", "replica", "data", "training/step.py", "training/trainer.py")
"""What a newcomer reads in an evening."""
DEATH = ("dead", "death", "die", "died", "dies", "killed", "lost", "crash", "recovery", "recover", "survive")
"""Words that have no place there."""

MOST_MODULE, MOST_FUNCTION, MOST_ARGUMENTS = 500, 70, 12
CEILING = 37_945
"""Lines of the whole source. Lower it whenever the source has become smaller; the goal is 25,500."""


def modules() -> Iterator[tuple[str, Path]]:
    """Each module's place below the package, as in ``collective/base.py``, and its file."""
    for file in sorted(SOURCE.rglob("*.py")):
        yield file.relative_to(SOURCE).as_posix(), file


def lines(file: Path) -> int:
    """Lines of a file, blank ones and docstrings included."""
    return len(file.read_text().splitlines())


def room(place: str) -> str:
    """The package or top module that a module belongs to."""
    return place.split("/")[0].removesuffix(".py")


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """Modules of this package that a file imports when it runs, and whether only inside a function."""
    tree = ast.parse(file.read_text())
    inside = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)}
    typing = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and ast.unparse(test.test).endswith("TYPE_CHECKING")
        for node in ast.walk(test)
    }
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        lazy = id(node) in inside
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "unisono":
            if node.module == "unisono":
                yield from ((f"unisono.{alias.name}", lazy) for alias in node.names)
            else:
                yield node.module, lazy
        elif isinstance(node, ast.Import):
            yield from ((alias.name, lazy) for alias in node.names if alias.name.startswith("unisono."))


def upward_imports() -> list[str]:
    """Imports that go up a floor, or from a floor to what stands beside them."""
    found = []
    for place, file in modules():
        own = room(place)
        if own in BESIDE:
            continue
        for module, lazy in imports(file):
            other = module.split(".")[1]
            if place == "launch/cli.py" and lazy:
                continue  # the command names what it starts
            if FLOORS.get(other, 99) > FLOORS[own]:
                found.append(f"{place} (floor {FLOORS[own]}) imports {module}")
    return found


def import_circles() -> list[str]:
    """Modules that import each other when they are loaded, directly or by way of others."""
    graph = defaultdict(set)
    names = {place.removesuffix(".py").removesuffix("/__init__").replace("/", "."): place for place, _ in modules()}
    for place, file in modules():
        own = place.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for module, lazy in imports(file):
            target = module.removeprefix("unisono.")
            if not lazy and target in names and target != own:
                graph[own].add(target)
    return [
        f"{start} <-> {other}"
        for start, other in itertools.combinations(sorted(graph), 2)
        if other in _reachable(graph, start) and start in _reachable(graph, other)
    ]


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        for target in graph.get(todo.pop(), ()):
            if target not in seen:
                seen.add(target)
                todo.append(target)
    return seen


def long_modules() -> list[str]:
    """Modules of more lines than allowed."""
    return [f"{place}: {lines(file)}" for place, file in modules() if lines(file) > MOST_MODULE]


def long_functions() -> list[str]:
    """Functions of more lines than allowed, but for the Trainer's constructor, and constructors of more arguments."""
    found = []
    for place, file in modules():
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            count = len(node.args.args) + len(node.args.kwonlyargs) - 1
            if place == "training/trainer.py" and node.name == "__init__":
                continue
            if size > MOST_FUNCTION:
                found.append(f"{place}:{node.lineno} {node.name}: {size} lines")
            if node.name == "__init__" and count > MOST_ARGUMENTS:
                found.append(f"{place}:{node.lineno} {node.name}: {count} arguments")
    return found


def repeated_names() -> list[str]:
    """Classes that share a name with another one."""
    homes = defaultdict(list)
    for place, file in modules():
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(place)
    return [f"{name}: {', '.join(places)}" for name, places in sorted(homes.items()) if len(places) > 1]


def reading() -> list[tuple[str, Path]]:
    """The modules of an evening's reading."""
    return [(place, file) for place, file in modules() if any(place == part or place.startswith(f"{part}/") for part in READING)]


def words_about_death() -> list[str]:
    """Lines of the evening's reading that speak of workers that are lost."""
    found = []
    for place, file in reading():
        for number, line in enumerate(file.read_text().splitlines(), 1):
            words = {word.strip(".,;:()`'\"") for word in line.lower().split()}
            if words & set(DEATH):
                found.append(f"{place}:{number}: {line.strip()}")
    return found


def main() -> None:
    """Prints everything."""
    sizes: dict[str, int] = defaultdict(int)
    for place, file in modules():
        sizes[room(place)] += lines(file)
    for name in sorted(sizes, key=lambda name: (FLOORS.get(name, 99), name)):
        print(f"{'beside' if name in BESIDE else f'floor {FLOORS[name]}':8} {name:14} {sizes[name]:6,}")
    print(f"in all {sum(sizes.values()):,} lines, at most {CEILING:,}")
    print(f"an evening's reading {sum(lines(file) for _, file in reading()):,} lines (the goal is 4,800)")
    for title, found in {
        "imports that go up": upward_imports(),
        "import circles": import_circles(),
        f"modules over {MOST_MODULE} lines": long_modules(),
        f"functions over {MOST_FUNCTION} lines, constructors over {MOST_ARGUMENTS} arguments": long_functions(),
        "class names used twice": repeated_names(),
        "words about death in the evening's reading": words_about_death(),
    }.items():
        print(f"{title}: {len(found) or 'none'}")
        for line in found:
            print(f"  {line}")


if __name__ == "__main__":
    main()
