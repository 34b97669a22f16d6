"""The rooms of the design and who may import whom, read from the source of every file."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from moesaic.proto.errors import ERRORS
from tests.helpers.paths import ROOT

ROOMS = ("proto", "kernels", "cluster", "models", "actors")
FACE = "face"
# Which folder may import which others, from the bottom to the top: the arrows that there are, no
# more. A folder imports from rows above its own alone, so there is no cycle.
ARROWS = """
proto                               -
kernels                             -
kernels/grouped                     -
kernels/backward                    kernels kernels/grouped
kernels/training                    proto kernels kernels/backward
kernels/slabs                       kernels kernels/grouped
models/folder                       proto
models/trunk                        proto kernels models/folder
models/export                       proto models/folder models/trunk
models/upcycling                    proto models/folder
models/data                         proto models/folder
models/training                     proto kernels models/data models/trunk
models                              proto models/folder models/upcycling

cluster                             proto
cluster/reports                     -
cluster/tracing                     -
cluster/service                     proto
cluster/load                        cluster cluster/reports
cluster/batching                    cluster
cluster/host                        proto cluster cluster/reports
cluster/routing                     cluster cluster/load
cluster/planner                     cluster cluster/reports
cluster/training                    proto cluster
cluster/control                     cluster cluster/load cluster/planner cluster/reports
                                    cluster/training
cluster/page_feed                   proto cluster cluster/reports
cluster/metrics                     cluster/load cluster/reports cluster/control
cluster/scaling                     cluster/load cluster/planner cluster/reports
                                    cluster/control
cluster/spec                        proto cluster cluster/service cluster/batching
                                    cluster/host cluster/routing cluster/planner cluster/control
                                    cluster/reports cluster/scaling cluster/tracing
cluster/train_command               proto cluster/spec
cluster/comparison                  cluster cluster/load cluster/planner cluster/control
                                    cluster/scaling

actors/text                         proto
actors/tracing                      proto cluster cluster/routing cluster/tracing
actors/runtime                      proto cluster cluster/routing cluster/spec
                                    actors/tracing
actors/store                        proto cluster cluster/planner cluster/spec actors/runtime
actors/transport                    proto kernels/slabs models/folder
actors/transport/grpc               proto cluster cluster/training actors/transport
actors/transport/bulk               proto kernels/slabs cluster cluster/training actors/transport
                                    actors/transport/grpc
actors/engine                       proto cluster cluster/reports cluster/routing cluster/spec
                                    cluster/tracing actors/text actors/tracing
actors/engine/transformers_backend  proto cluster/routing cluster/tracing actors/engine
actors/router                       proto kernels kernels/grouped kernels/slabs models/trunk
                                    cluster cluster/load cluster/routing cluster/training
                                    actors/runtime actors/store actors/transport
                                    actors/transport/grpc actors/engine
                                    cluster/tracing actors/tracing
actors/training/lead                proto cluster cluster/training actors/runtime actors/store
actors/training                     proto kernels kernels/backward kernels/slabs
                                    kernels/training models/export models/trunk models/training
                                    cluster cluster/routing cluster/spec
                                    cluster/training actors/runtime actors/store
                                    actors/transport/bulk actors/router actors/training/lead
actors/engine/vllm_backend          proto models/folder models/trunk cluster cluster/routing
                                    cluster/tracing
                                    actors/runtime actors/text actors/engine actors/router
actors/host/memory                  proto kernels kernels/backward kernels/slabs models/trunk
                                    cluster cluster/host actors/runtime
actors/host                         proto kernels kernels/backward kernels/grouped kernels/slabs
                                    kernels/training
                                    models/folder models/trunk cluster cluster/host cluster/reports
                                    cluster/routing cluster/training actors/runtime actors/store
                                    actors/transport actors/transport/grpc actors/transport/bulk
                                    actors/host/memory
                                    actors/tracing
actors/simulator                    proto kernels models/trunk cluster cluster/load cluster/host
                                    cluster/routing cluster/planner cluster/control
                                    cluster/scaling actors/transport actors/router
                                    actors/host/memory actors/host
actors/trunk                        proto models/folder models/trunk models/training cluster
                                    cluster/reports actors/runtime actors/store
                                    actors/transport/grpc actors/engine
                                    actors/engine/transformers_backend actors/router
                                    actors/engine/vllm_backend actors/host actors/training
actors/training/command             proto kernels/training cluster cluster/load cluster/reports
                                    cluster/train_command models/data models/export models/folder
                                    models/training models/trunk actors/runtime actors/store
                                    actors/training actors/trunk
actors/router_service               proto kernels models/trunk cluster cluster/batching
                                    cluster/reports cluster/routing cluster/spec actors/runtime
                                    actors/store actors/transport actors/transport/grpc
                                    actors/engine actors/router
                                    cluster/tracing actors/tracing
actors/controller                   proto cluster cluster/load cluster/host cluster/planner
                                    cluster/reports
                                    cluster/training cluster/control cluster/metrics
                                    cluster/scaling cluster/spec cluster/page_feed
                                    actors/runtime actors/store actors/transport/grpc actors/host
                                    actors/router_service
actors/endpoint/openai              proto cluster/routing actors/text actors/engine
actors/endpoint/http                proto cluster/metrics cluster/reports cluster/service
                                    cluster/spec
                                    actors/runtime actors/tracing actors/engine
                                    actors/endpoint/openai
actors/endpoint                     proto cluster/service actors/text actors/tracing actors/engine
                                    actors/endpoint/openai actors/endpoint/http
actors/page                         proto cluster/page_feed cluster/service actors/endpoint/http
actors/preflight                    proto kernels/training models models/folder models/trunk cluster
                                    cluster/planner cluster/scaling cluster/spec cluster/training
                                    actors/text actors/runtime actors/engine
actors/serve/replica                proto models/folder cluster/metrics cluster/reports
                                    cluster/service cluster/routing cluster/spec
                                    cluster/page_feed
                                    actors/runtime actors/store actors/engine actors/tracing
                                    actors/endpoint actors/endpoint/http actors/page
actors/serve                        proto models cluster cluster/reports
                                    cluster/service cluster/spec
                                    actors/runtime actors/store actors/engine actors/trunk
                                    actors/tracing
                                    actors/router_service actors/controller
                                    actors/endpoint/http actors/preflight actors/serve/replica
"""
MAX_FILES = 15
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


def allowed_arrows() -> dict[str, list[str]]:
    """ARROWS, folder by folder; a line that begins with spaces goes on with the one before it."""
    table: dict[str, list[str]] = {}
    for line in ARROWS.strip().splitlines():
        folder, *below = (
            line.split() if line[:1].strip() else (next(reversed(table)), *line.split())
        )
        if line:
            table.setdefault(folder, []).extend(name for name in below if name != "-")
    return table


def folder_of(file: Path) -> str:
    return str(file.parent.relative_to(ROOT))


def arrows(file: Path, room: str) -> Iterator[tuple[int, str]]:
    """(line, folder) of every import of a file from another folder of the rooms."""
    for line, name in imported(file, room):
        parts = name.split(".")
        if parts[0] != "moesaic" or len(parts) < 3 or parts[1] not in ROOMS:
            continue
        # The name's last part may be a module or what one holds.
        path = ROOT.joinpath(*parts[1:-1])
        folder = str((path if path.is_dir() else path.parent).relative_to(ROOT))
        if folder != folder_of(file):
            yield line, folder


def test_imports_run_downwards_only() -> None:
    table = allowed_arrows()
    wrong, used = [], set()
    for room in ROOMS:
        for file in files(room):
            folder = folder_of(file)
            for line, target in arrows(file, room):
                used.add((folder, target))
                if target not in table.get(folder, ()):
                    wrong.append(f"{where(file, line)}: {folder} -> {target}")
    assert not wrong, "not in ARROWS"
    stale = {(folder, target) for folder, below in table.items() for target in below} - used
    assert not stale, "in ARROWS, and no import"


def test_the_table_of_arrows_has_no_cycle() -> None:
    seen: set[str] = set()
    for folder, below in allowed_arrows().items():
        assert set(below) <= seen, f"{folder} stands above what it imports"
        seen.add(folder)


def test_the_map_has_a_line_for_every_folder_and_names_what_exists() -> None:
    text = (ROOT / "docs" / "structure.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    for folder in {folder_of(file) for room in ROOMS for file in files(room)}:
        above, _, name = folder.rpartition("/")
        assert any(
            line.startswith(f"| `{folder}/`")
            or (line.startswith(f"| `{above}/`") and f"`{name}/`" in line)
            for line in lines
        ), folder
    named = re.findall(r"`((?:\w+/)+\w+\.(?:py|proto))`", text)
    assert len(named) > 30
    assert [path for path in named if not (ROOT / path).exists()] == []


# What an extension may import: the interface that docs/extensions.md describes.
FOR_EXTENSIONS = ("moesaic.models.trunk.adapters.", "moesaic.models.trunk.architecture.")


def test_an_extension_knows_the_interface_alone_and_nothing_knows_it() -> None:
    source = ROOT / "extensions" / "architectures" / "src"
    found = sorted(source.rglob("*.py"))
    assert found
    wrong = [
        f"{where(file, node.lineno)}: {node.module}.{alias.name}"
        for file in found
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moesaic.")
        for alias in node.names
        if not f"{node.module}.{alias.name}".startswith(FOR_EXTENSIONS)
    ]
    wrong += [
        f"{where(file, line)}: {name}"
        for room, file in everything()
        for line, name in imported(file, room)
        if name.startswith("moesaic_architectures")
    ]
    assert not wrong
    assert [file for file in found if len(file.read_text().splitlines()) > MAX_LINES] == []


def test_only_the_face_imports_the_face() -> None:
    wrong = [
        f"{where(file, line)}: {name}"
        for room in ROOMS
        for file in files(room)
        for line, name in imported(file, room)
        if name.partition(".")[0] == "moesaic" and name.split(".")[1:2][0] not in ROOMS
    ]
    assert not wrong


def test_folders_are_small() -> None:
    helpers = (ROOT / "tests" / "helpers").rglob("*.py")
    found = [*(file for _, file in everything()), *helpers]
    counts = Counter(str(file.parent.relative_to(ROOT)) for file in found)
    assert {folder: n for folder, n in counts.items() if n > MAX_FILES} == {}


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
