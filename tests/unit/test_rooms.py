"""The rooms of the design and who may import whom, read from the source of every file."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moesaic.proto.errors import ERRORS

ROOT = Path(__file__).parents[2]
ROOMS = ("proto", "kernels", "cluster", "models", "actors")
FACE = "face"
# Downwards only: what each room may import besides itself.
BELOW = {
    "proto": set(),
    "kernels": set(),
    "cluster": {"proto"},
    "models": {"kernels", "proto"},
    "actors": {"models", "cluster", "kernels", "proto"},
    FACE: set(ROOMS),
}
MAX_LINES = 500
# Longer files, each with its reason. Keep it empty.
LONGER: dict[str, str] = {}


def files(room: str) -> list[Path]:
    """The written files of a room; generated stubs apart."""
    folder = ROOT / "src" / "moesaic" if room == FACE else ROOT / room
    found = []
    for file in sorted(folder.rglob("*.py")):
        behind_a_link = any(part.is_symlink() for part in file.parents if part != ROOT)
        if not behind_a_link and not file.stem.endswith(("_pb2", "_pb2_grpc")):
            found.append(file)
    return found


def imported(file: Path, room: str) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of every import of a file, wherever it stands in it."""
    inside = file.relative_to(ROOT / "src" / "moesaic" if room == FACE else ROOT).parent.parts
    package = ["moesaic", *inside]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, node.module] if node.module else above)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def everything() -> list[tuple[str, Path]]:
    return [(room, file) for room in (*ROOMS, FACE) for file in files(room)]


def where(file: Path, line: int) -> str:
    return f"{file.relative_to(ROOT)}:{line}"


def test_all_rooms_are_seen() -> None:
    counts = {room: len(files(room)) for room in (*ROOMS, FACE)}
    assert all(counts.values()), counts
    assert ROOT / "src/moesaic/cli/main.py" in files(FACE)
    assert ROOT / "actors/transport/shm.py" in files("actors")


def test_imports_run_downwards_only() -> None:
    wrong = []
    for room, file in everything():
        for line, name in imported(file, room):
            top, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            if top != "moesaic":
                continue
            target = target if target in ROOMS else FACE
            if target != room and target not in BELOW[room]:
                wrong.append(f"{where(file, line)}: {room} imports {name}")
    assert not wrong


@pytest.mark.parametrize(
    ("rooms", "library"),
    [
        (("proto", "kernels", "cluster", "models", FACE), "ray"),
        (("proto", "kernels", "cluster", "models", FACE), "grpc"),
        (("cluster",), "torch"),
        (("cluster",), "transformers"),
        (("cluster",), "safetensors"),
        (("kernels", "proto"), "transformers"),
    ],
)
def test_libraries_stay_in_their_rooms(rooms: tuple[str, ...], library: str) -> None:
    wrong = [
        f"{where(file, line)}: {name}"
        for room in rooms
        for file in files(room)
        for line, name in imported(file, room)
        if name == library or name.startswith(f"{library}.")
    ]
    assert not wrong


def test_no_clock_and_no_threads_where_decisions_are_made() -> None:
    """The clock and all observations are arguments."""
    banned = ("time", "threading", "asyncio", "socket", "select", "subprocess", "random")
    wrong = [
        f"{where(file, line)}: {name}"
        for file in files("cluster")
        for line, name in imported(file, "cluster")
        if name.partition(".")[0] in banned
    ]
    assert not wrong


def test_rooms_are_imported_relatively_inside_and_never_by_their_bare_name() -> None:
    """A bare `proto` or `kernels` on a Ray worker's path is another package."""
    wrong = []
    for _, file in everything():
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            tops = {name.partition(".")[0] for name in names}
            if tops & {*ROOMS, "moesaic", "src"}:
                wrong.append(where(file, getattr(node, "lineno", 0)))
    assert not wrong


def test_the_tree_of_errors_has_no_branch_elsewhere() -> None:
    """An error that proto/errors.py does not know would cross a wire as an InternalError."""
    wrong = [
        f"{where(file, node.lineno)}: {node.name}"
        for _, file in everything()
        if file != ROOT / "proto" / "errors.py"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
        and {base.id for base in node.bases if isinstance(base, ast.Name)} & ERRORS.keys()
    ]
    assert not wrong


def test_rooms_have_no_init_file() -> None:
    """Ray puts the driver's folder on every worker's path: a package would shadow others."""
    assert [room for room in ROOMS if (ROOT / room / "__init__.py").exists()] == []


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_is_a_relative_link_of_the_package(room: str) -> None:
    link = ROOT / "src" / "moesaic" / room
    assert link.is_symlink()
    assert link.readlink() == Path("..", "..", room)
    assert link.resolve() == ROOT / room


def test_generated_stubs_are_the_only_ones_outside_that_import_grpc() -> None:
    stubs = sorted(file.name for file in (ROOT / "proto").glob("*_pb2_grpc.py"))
    assert stubs == ["expert_pb2_grpc.py", "router_pb2_grpc.py"]


def test_files_are_small() -> None:
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for _, file in everything()
    }
    assert {name for name, lines in lengths.items() if lines > MAX_LINES} == set(LONGER)


PROBE = """
import sys
import moesaic
moesaic.Client("http://127.0.0.1:1")
heavy = {"ray", "torch", "transformers", "grpc", "numpy", "safetensors", "google.protobuf"}
print(sorted(heavy & set(sys.modules)))
"""


def test_a_client_that_speaks_http_only_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_the_face_names_what_it_promises() -> None:
    import moesaic

    for name in moesaic.__all__:
        assert getattr(moesaic, name).__module__.startswith("moesaic.")
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = moesaic.nothing_like_this
