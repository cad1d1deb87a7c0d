"""What holds of the source as a whole: who may name a task, and how long a function may be."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import vitrail
import vitrail_runtime
from vitrail.tasks.task import TASKS, task_of

SRC = Path(vitrail.__file__).parent
RUNTIME = Path(vitrail_runtime.__file__).parent

# These stand above the tasks and never ask which one they have (design, "Four axes").
BLIND = sorted(
    [
        *SRC.glob("train/*.py"),
        *SRC.glob("cli/*.py"),
        SRC / "predictor.py",
        SRC / "analysis" / "page.py",
        SRC / "analysis" / "report.py",
    ]
)
WORDS = {  # names of tasks, of their truths, models and scores, those to come among them
    *(word for name in TASKS for word in (name, task_of(name).truth, task_of(name).headline)),
    *("classification", "segmentation", "semantic", "detect", "detection", "panoptic", "contrast"),
    *("Labels", "ClassMaps", "Boxes", "Captions", "Classifier", "Segmenter", "Detector"),
    *("top-1", "top5", "top-5", "pixel_accuracy", "AP", "PQ"),
}
KNOWN = {  # what stands there all the same, and why
    (
        "cli/models.py",
        "top1",
    ): "papers' ImageNet score of a backbone, which they give for all of them",
    ("cli/predict.py", "segmentation"): "a field of Prediction: what is there is written",
}
LINES = 60  # of a function, at most
LONG = {  # (file, function): why it is longer
    (
        "ops/triton/ms_deform_attn.py",
        "_backward",
    ): "a kernel, which Triton compiles as one function",
}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def docstrings(tree: ast.AST) -> set[int]:
    """Strings that stand alone: what documents a function, a class or a field."""
    return {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def words_of(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, word) of what code names: variables, attributes, arguments, imports, whole strings. A sentence
    that holds a word is none of them."""
    quiet = docstrings(tree)
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in quiet:
            yield line, node.value
        elif isinstance(node, ast.Name):
            yield line, node.id
        elif isinstance(node, ast.Attribute):
            yield line, node.attr
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            yield line, node.arg
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield line, alias.name
            if node.module.startswith("vitrail.tasks."):
                yield line, node.module.removeprefix("vitrail.tasks.")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield line, alias.name.removeprefix("vitrail.tasks.")


def named(tree: ast.Module) -> list[tuple[int, str]]:
    return [(line, word) for line, word in words_of(tree) if word in WORDS]


def asked(tree: ast.Module) -> list[int]:
    """Lines that compare a task with something."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        for side in (node.left, *node.comparators)
        if isinstance(side, ast.Attribute) and side.attr == "task"
    ]


@pytest.mark.parametrize("path", BLIND, ids=lambda p: str(p.relative_to(SRC)))
def test_who_stands_above_the_tasks_names_none(path):
    tree, name = parsed(path), path.relative_to(SRC).as_posix()
    found = [(line, word) for line, word in named(tree) if (name, word) not in KNOWN]
    assert not found, "let the task, its Scores or its Demo say it (vitrail/tasks)"
    assert not asked(tree), "no `if task ==`: give the task what differs"


def test_what_is_known_to_stand_there_still_does():
    for name, word in KNOWN:
        assert word in {w for _, w in named(parsed(SRC / name))}, (name, word)


@pytest.mark.parametrize(
    "code",
    [
        'if model.task == "segment": pass',
        "if 'x' != config.task: pass",
        "from vitrail.tasks.segment import Settings",
        "from vitrail.tasks import classify",
        "import vitrail.tasks.classify",
        "from vitrail.models import Segmenter",
        'best = scores["mIoU"]',
        "isinstance(truth, examples.Labels)",
        "evaluate(top1=True)",
        'row = {"top-1": 1}',
    ],
)
def test_the_rule_sees_a_task_that_is_named(code):
    tree = ast.parse(code)
    assert named(tree) or asked(tree)


@pytest.mark.parametrize(
    "code",
    [
        '"""How to classify."""',
        "class A:\n    x: int = 0\n    'semantic'",
        'print("vitrail data make digits --task semantic")',
        "from vitrail.tasks.task import task_of",
        "task_of(model.task).evaluator(model, data)",
    ],
)
def test_the_rule_lets_sentences_and_the_tasks_own_protocol_pass(code):
    assert not named(ast.parse(code))
    assert not asked(ast.parse(code))


def functions() -> Iterator[tuple[str, str, int]]:
    """(file, function, lines from `def` to its end) of everything that is shipped."""
    for top in (SRC, RUNTIME):
        for path in sorted(top.rglob("*.py")):
            for node in ast.walk(parsed(path)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    assert node.end_lineno is not None
                    lines = node.end_lineno - node.lineno + 1
                    yield path.relative_to(top).as_posix(), node.name, lines


def test_a_function_fits_on_a_screen_or_says_why_not():
    long = {(path, name): lines for path, name, lines in functions() if lines > LINES}
    assert not {key: lines for key, lines in long.items() if key not in LONG}
    assert set(LONG) <= set(long), "no longer long: strike it off the list"
