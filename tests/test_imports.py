"""Who may import whom (docs/design): a room imports only what stands to its left."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vitrail
import vitrail_runtime

SRC = Path(vitrail.__file__).parent
RUNTIME = Path(vitrail_runtime.__file__).parent

# Rooms of one level do not know each other, except those in the same inner tuple.
LEVELS: list[set[str]] = [
    {
        "features",
        "registry",
        "configuration",
        "device",
        "memory",
        "modes",
        "packing",
        "rows",
        "boxes",
        "ops",
        "weights",
    },
    {"layers"},
    {"backbones"},
    {"necks"},
    {"classifiers", "detectors", "segmenters"},
    {"towers", "learnable_memory"},
    {"assembly"},
    {"models"},
    {"predictor", "adapt", "tasks"},
    {"train", "deploy", "analysis", "bench"},
    {"recipes"},
    {"cli"},
]
LEVEL = {room: i for i, rooms in enumerate(LEVELS) for room in rooms}
SIDE = {  # rooms beside the line: what they may know, and from which level they may be known
    "data": {"features", "packing", "boxes", "configuration", "memory", "registry"},
    "metrics": {"features", "packing", "boxes"},
}


def imports_of(path: Path, top: str = "vitrail") -> set[str]:
    """The rooms of `top` that a file imports, at module level or inside functions."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module] if node.module != top else [f"{top}.{a.name}" for a in node.names]
        else:
            continue
        rooms |= {n.split(".")[1] for n in names if n.startswith(top + ".")}
    return rooms & {p.stem for p in SRC.iterdir()}


def room_files() -> list[tuple[str, Path]]:
    files = []
    for path in sorted(SRC.rglob("*.py")):
        room = path.relative_to(SRC).parts[0].removesuffix(".py")
        if room not in ("__init__", "__main__"):
            files.append((room, path))
    return files


@pytest.mark.parametrize(("room", "path"), room_files(), ids=lambda v: str(getattr(v, "name", v)))
def test_a_room_imports_only_what_stands_to_its_left(room, path):
    for other in imports_of(path) - {room}:
        if room in SIDE:
            assert other in SIDE[room], f"{room} must not import {other}"
        elif other in SIDE:
            assert LEVEL[room] >= LEVEL["predictor"], f"{room} must not import {other}"
        else:
            level, theirs = LEVEL[room], LEVEL[other]
            # The first level is one group that may use each other; so may analysis and bench.
            assert theirs < level or (theirs == level == 0), f"{room} must not import {other}"


def test_every_room_has_a_place_in_the_order():
    rooms = {room for room, _ in room_files()}
    assert rooms <= LEVEL.keys() | SIDE.keys(), rooms - LEVEL.keys() - SIDE.keys()


def test_the_runtime_knows_neither_vitrail_nor_torch():
    for path in RUNTIME.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for name in names:
                assert name.split(".")[0] not in ("vitrail", "torch", "torchvision"), (path, name)


def test_only_train_imports_accelerate():
    for room, path in room_files():
        text = path.read_text(encoding="utf-8")
        assert "import accelerate" not in text or room == "train", path
        assert "from accelerate" not in text or room == "train", path


@pytest.mark.parametrize(
    "module",
    ["vitrail", "vitrail_runtime", "vitrail.cli", "vitrail.train.config", "vitrail.tasks.section"],
)
def test_importing_the_public_face_does_not_import_torch(module):
    code = f"import {module}, sys; assert 'torch' not in sys.modules, 'torch was imported'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there():
    for name in vitrail.__all__:
        assert getattr(vitrail, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        vitrail.nonsense  # noqa: B018  (the access is the test)


def test_measuring_a_model_imports_nothing_that_one_process_does_not_need():
    """Each takes seconds of a core, which `vitrail eval` would pay at every start."""
    code = (
        "import sys, vitrail.cli.eval, vitrail.train.evaluate, vitrail.tasks.probe; "
        "heavy = {'torchmetrics', 'torch.distributed.tensor', 'transformers', 'accelerate'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
