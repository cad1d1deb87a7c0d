"""Mutation testing: put one small bug at a time into a copy of the code and see whether a fast test fails.

    make mutants ROOM=train                # all mutants of a room; stopped, the same command goes on
    make mutants ROOM=train SAMPLE=200     # a seeded sample of it
    make mutants ROOM=train AGAIN=1        # what has survived, asked again with the tests of now
    make mutants ROOM=table                # the table of docs/quality.md, from what has run so far

Cosmic Ray makes the mutants and keeps the session (.mutants/ROOM.sqlite, which its own reports read,
too). Here stand two things that it lacks. Operators for the bugs that training suffers from: a call that is
left out (`ema.update(model)`), a keyword that is not passed on, `min` for `max`. And a runner that forks from
a process which has imported PyTorch already, and runs only those tests that reach the mutated line, the
quick ones first: a mutant costs seconds, not minutes.

A mutant that survives is a missing test, or changes nothing that anyone can observe: those stand, with the
reason, in scripts/mutants_explained.txt and do not count.
"""

import argparse
import ast
import contextlib
import difflib
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".mutants"
EXPLAINED = ROOT / "scripts" / "mutants_explained.txt"
FAST = "not slow and not gpu and not network"

# Room -> what is mutated, and the tests that are asked.
ROOMS = {
    "train": (["src/vitrail/train"], ["tests/train", "tests/test_cli.py"]),
    "data": (["src/vitrail/data"], ["tests/data"]),
    "metrics": (["src/vitrail/metrics"], ["tests/metrics", "tests/train/test_eval.py"]),
    "analysis": (["src/vitrail/analysis"], ["tests/analysis"]),
    "tasks": (
        ["src/vitrail/tasks"],
        ["tests/tasks", "tests/analysis"]
        + [f"tests/train/test_{name}.py" for name in ("eval", "evaluate", "probe", "every_task")],
    ),
    "layers": (
        ["src/vitrail/layers"],
        # Compiling and exporting every family takes longer than all the rest.
        ["tests/layers", "tests/backbones", "tests/contracts", "-k", "not compil and not export"],
    ),
    "weights": (
        ["src/vitrail/weights"],
        [
            "tests/weights",
            "tests/test_convert.py",
            "tests/test_models.py",
            "tests/test_published.py",
        ],
    ),
    "runtime": (
        ["runtime/src/vitrail_runtime"],
        ["tests/runtime", "tests/test_predictor.py", "tests/test_cli_predict.py"],
    ),
}

OPERATORS = """
ReplaceBinaryOperator_Add_Sub ReplaceBinaryOperator_Sub_Add ReplaceBinaryOperator_Mul_Div
ReplaceBinaryOperator_Div_Mul ReplaceBinaryOperator_FloorDiv_Mul ReplaceBinaryOperator_Mod_FloorDiv
ReplaceBinaryOperator_Pow_Mul ReplaceBinaryOperator_BitOr_BitAnd ReplaceBinaryOperator_BitAnd_BitOr
ReplaceComparisonOperator_Lt_LtE ReplaceComparisonOperator_LtE_Lt ReplaceComparisonOperator_Gt_GtE
ReplaceComparisonOperator_GtE_Gt ReplaceComparisonOperator_Eq_NotEq ReplaceComparisonOperator_NotEq_Eq
ReplaceComparisonOperator_Is_IsNot ReplaceComparisonOperator_IsNot_Is ReplaceUnaryOperator_Delete_USub
ReplaceUnaryOperator_Delete_Not AddNot ReplaceTrueWithFalse ReplaceFalseWithTrue ReplaceAndWithOr
ReplaceOrWithAnd ReplaceBreakWithContinue ReplaceContinueWithBreak NumberReplacer RemoveDecorator
ZeroIterationForLoop
"""

# Imported before forking. Never vitrail itself: each mutant imports its own.
PRELOAD = """
torch torch._dynamo torch.distributed.tensor torch.utils.data torchvision torchcodec.decoders accelerate timm
transformers sklearn.linear_model sklearn.neighbors sklearn.metrics scipy.stats scipy.optimize
matplotlib.pyplot torchmetrics.classification hypothesis pytest tyro rich.progress safetensors.torch
PIL.Image numpy yaml huggingface_hub psutil onnx onnxruntime
"""


def own_operators() -> dict[str, type]:
    """Operators of our own, on the syntax trees of Cosmic Ray (parso)."""
    import parso
    from cosmic_ray.operators.operator import Operator

    class DropCall(Operator):
        """A statement that is nothing but a call becomes `pass`."""

        def mutation_positions(self, node):
            if node.type == "simple_stmt":
                first = node.children[0]
                call = first.type in ("atom_expr", "power") and first.children[-1].type == "trailer"
                if call and first.children[-1].children[0].value == "(":
                    yield first.start_pos, first.end_pos

        def mutate(self, node, index):
            prefix = node.children[0].get_first_leaf().prefix
            node.children[0] = parso.python.tree.Keyword("pass", node.start_pos, prefix)
            node.children[0].parent = node
            return node

        @classmethod
        def examples(cls):
            return ()

    class DropKeyword(Operator):
        """A keyword argument is not passed on."""

        def mutation_positions(self, node):
            if node.type == "arglist":
                for child in node.children:
                    if child.type == "argument" and child.children[1] == "=":
                        yield child.start_pos, child.end_pos

        def mutate(self, node, index):
            found = [c for c in node.children if c.type == "argument" and c.children[1] == "="]
            at = node.children.index(found[index])
            del node.children[at if at == 0 else at - 1 : at + 2 if at == 0 else at + 1]
            return node

        @classmethod
        def examples(cls):
            return ()

    class SwapName(Operator):
        """A function is taken for its sister."""

        pairs = (
            ("min", "max"),
            ("floor", "ceil"),
            ("any", "all"),
            ("zeros", "ones"),
            ("argmin", "argmax"),
        )
        sisters = {a: b for pair in pairs for a, b in (pair, pair[::-1])}  # noqa: RUF012

        def mutation_positions(self, node):
            if node.type == "name" and node.value in self.sisters:
                after = node.get_next_leaf()
                if after is not None and after.value == "(" and node.parent.type != "funcdef":
                    yield node.start_pos, node.end_pos

        def mutate(self, node, index):
            node.value = self.sisters[node.value]
            return node

        @classmethod
        def examples(cls):
            return ()

    return {"DropCall": DropCall, "DropKeyword": DropKeyword, "SwapName": SwapName}


def operator(name: str) -> object:
    import cosmic_ray.plugins

    own = own_operators()
    return (own[name] if name in own else cosmic_ray.plugins.get_operator(f"core/{name}"))()


def annotations(source: str) -> set[tuple[int, int]]:
    """(line, column) of what stands in type annotations: a `|` there is no computation."""
    places = set()
    for node in ast.walk(ast.parse(source)):
        given = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        for annotation in filter(None, given):
            for part in ast.walk(annotation):
                if isinstance(part, ast.expr):
                    for line in range(part.lineno, part.end_lineno + 1):
                        first = part.col_offset if line == part.lineno else 0
                        last = part.end_col_offset if line == part.end_lineno else 200
                        places |= {(line, column) for column in range(first, last)}
    return places


def make_session(room: str, database) -> None:
    """All mutants of a room. Where a module has not changed, what was found before stays."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.work_item import MutationSpec, WorkItem

    paths = [p for folder in ROOMS[room][0] for p in sorted((ROOT / folder).rglob("*.py"))]
    sources = {str(path.relative_to(ROOT)): path.read_text() for path in paths}
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in sources.items()}
    kept_hashes = HOME / f"{room}.sources.json"
    before = json.loads(kept_hashes.read_text()) if kept_hashes.exists() else {}
    if before == hashes and database.num_work_items:
        return
    results = [
        r
        for r in database.results
        if hashes.get(r[0].split(":")[0], "") == before.get(r[0].split(":")[0])
    ]
    database.clear()
    kept_hashes.write_text(json.dumps(hashes))
    items = []
    for name, source in sources.items():
        if source.strip():
            tree, skip, lines = get_ast(source), annotations(source), source.split("\n")
            for kind in [*OPERATORS.split(), *own_operators()]:
                made = operator(kind)
                places = (p for node in ast_nodes(tree) for p in made.mutation_positions(node))
                for occurrence, (start, end) in enumerate(places):
                    line = lines[start[0] - 1]
                    left, right = line[: start[1]], line[start[1] :]
                    # `strict=True` asserts what holds anyway; the star before keywords multiplies nothing.
                    ours = left.endswith("strict=") or right.startswith(("strict=", "*,"))
                    if start not in skip and not ours:
                        spec = MutationSpec(name, kind, occurrence, start, end)
                        key = f"{name}:{start[0]}:{start[1]}:{kind}:{occurrence}"
                        items.append(WorkItem.single(key, spec))
    database.add_work_items(items)
    for key, result in results:
        database.set_result(key, result)


def preload() -> None:
    for name in PRELOAD.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def copy_tree(room: str, slot: int) -> Path:
    """A copy of what git knows, to be mutated; each room its own, so that two may run at once."""
    tree = HOME / f"{room}{slot}"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    return tree


def in_child(tree: Path, runs: list[list[str]], log: Path, plugins=()) -> int:
    """Fork; run pytest in a copy of the tree, on one list of arguments after the other until a test fails.
    The child's process number."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()  # so that a mutant that hangs is ended with its children
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.chdir(tree)
        own = [str(tree / "src"), str(tree / "runtime" / "src"), str(tree)]
        os.environ["PYTHONPATH"] = os.pathsep.join(own[:2])
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        sys.dont_write_bytecode = True
        sys.path[:0] = own
        import pytest

        common = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={tree}-tmp"]
        for arguments in runs:
            code = int(pytest.main([*common, *arguments], plugins=list(plugins)))
            if code:
                break
    finally:
        sys.stdout.flush()
        os._exit(code)


def covered(target, arguments: tuple, folders: list[str], file: str) -> None:
    """What a test starts in a process of its own; FILE tells which lines that reached."""
    import coverage

    watch = coverage.Coverage(data_file=None, source=folders)
    end = os._exit

    def tell() -> None:
        watch.stop()
        data = watch.get_data()
        lines = {name: data.lines(name) for name in data.measured_files()}
        Path(file).write_text(json.dumps(lines))

    def tell_and_end(code: int) -> None:
        tell()
        end(code)

    os._exit = tell_and_end  # as the tests' children end
    watch.start()
    try:
        target(*arguments)
    finally:
        tell()


class Patience:
    """A pytest plugin that ends a process whose test takes far longer than it did: it will never end."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        signal.alarm(30 + int(10 * self.seconds.get(nodeid, 0.0)))

    def pytest_sessionfinish(self) -> None:
        signal.alarm(0)


class Reached:
    """A pytest plugin: which test reaches which line, and how long it takes."""

    def __init__(self, tree: Path, room: str) -> None:
        import coverage

        self.tree, self.seconds = tree, {}
        self.out = HOME / f"{room}.reached.json"
        self.folders = [str(tree / folder) for folder in ROOMS[room][0]]
        self.coverage = coverage.Coverage(data_file=None, source=self.folders)
        self.test, self.started = "", []  # (test, what a process that it started reached)

    def pytest_sessionstart(self) -> None:
        self.coverage.start()
        start = BaseProcess.start

        def start_covered(process) -> None:
            if getattr(process, "_start_method", "") == "forkserver":
                file = str(HOME / f"child{len(self.started)}.json")
                arguments = (process._target, process._args, self.folders, file)
                process._target, process._args = covered, arguments
                self.started.append((self.test, Path(file)))
            start(process)

        BaseProcess.start = start_covered

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.test = nodeid
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration

    def pytest_runtest_logfinish(self) -> None:
        self.coverage.switch_context("")

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        data = self.coverage.get_data()
        lines = {
            str(Path(file).relative_to(self.tree)): {
                line: [c for c in contexts if c]
                for line, contexts in data.contexts_by_lineno(file).items()
            }
            for file in data.measured_files()
        }
        for test, file in self.started:
            if file.exists():  # one that was killed tells nothing
                for name, reached in json.loads(file.read_text()).items():
                    of = lines.setdefault(str(Path(name).relative_to(self.tree)), {})
                    for line in reached:
                        of.setdefault(line, []).append(test)
                file.unlink()
        self.out.write_text(json.dumps({"seconds": self.seconds, "lines": lines}))


def measure(room: str) -> dict:
    """Which of the room's tests reach which line; they must pass as the code stands. Measured anew where
    code or tests have changed: lines have moved then."""
    found, of = HOME / f"{room}.reached.json", HOME / f"{room}.reached.of.txt"
    files = [
        p for folder in ("src", "runtime", "tests") for p in sorted((ROOT / folder).rglob("*.py"))
    ]
    now = hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()
    if not (found.exists() and of.exists() and of.read_text() == now):
        tree, log = copy_tree(room, 0), HOME / f"{room}.log"
        started = time.monotonic()
        pid = in_child(tree, [["-m", FAST, *ROOMS[room][1]]], log, [Reached(tree, room)])
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code:
            found.unlink(missing_ok=True)
            sys.exit(f"the tests fail before anything is mutated; see {log}")
        of.write_text(now)
        print(f"{room}: its tests take {time.monotonic() - started:.0f} s", flush=True)
    return json.loads(found.read_text())


def statement(source: str, first: int, last: int) -> range:
    """The lines of the smallest statement around some lines; of one with a body, its head."""
    found = range(first, last + 1)
    for node in ast.walk(ast.parse(source)):  # outer ones come first
        if isinstance(node, ast.stmt) and node.lineno <= first and last <= node.end_lineno:
            body = getattr(node, "body", None)
            if not body:
                found = range(node.lineno, node.end_lineno + 1)
            elif first < body[0].lineno:
                found = range(node.lineno, max(body[0].lineno, last + 1))
    return found


def in_function(source: str, line: int) -> bool:
    """Whether a line stands in a function's body."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = (node for node in ast.walk(ast.parse(source)) if isinstance(node, functions))
    return any(f.body[0].lineno <= line <= f.end_lineno for f in found)


def tests_of(room: str, spec, source: str, reached: dict) -> tuple[list[str], float]:
    """The tests that reach a mutated line, the quick ones first, and how long they take in all."""
    seconds = reached["seconds"]
    lines = reached["lines"].get(str(spec.module_path), {})
    inside = [str(n) for n in statement(source, spec.start_pos[0], spec.end_pos[0])]
    names = {name for line in inside for name in lines.get(line, [])}
    if not names and not in_function(source, spec.start_pos[0]):
        names = set(seconds)  # run when the module is imported, before any test: tables, fields
    stem = spec.module_path.stem
    order = sorted(names, key=lambda n: (f"test_{stem}" not in n, seconds.get(n, 0.0)))
    return order, sum(seconds.get(name, 0.0) for name in names)


def in_two(tests: list[str], stem: str, listed: Path) -> list[list[str]]:
    """Arguments for the test file that is nearest, and for the rest: most mutants die before the rest is
    even imported."""
    if not tests:
        return [["--version"]]
    files = [name.split("::")[0] for name in tests]
    nearest = max(files, key=lambda file: (f"test_{stem}" in file, files.count(file)))
    runs = []
    for part, near in (("near", True), ("rest", False)):
        names = [n for n, file in zip(tests, files, strict=True) if (file == nearest) == near]
        if names:
            at = listed.with_name(f"{listed.name}.{part}.txt")
            at.write_text("\n".join(names))
            runs.append([f"@{at}"])
    return runs


def mutated(spec) -> tuple[str, str | None]:
    from cosmic_ray.mutating import mutate_code

    source = (ROOT / spec.module_path).read_text()
    return source, mutate_code(source, operator(spec.operator_name), spec.occurrence)


def changed_lines(before: str, after: str) -> tuple[str, str]:
    pair = {"-": [], "+": []}
    for line in difflib.unified_diff(before.split("\n"), after.split("\n"), lineterm="", n=0):
        if line[:1] in pair and not line.startswith(("---", "+++")):
            pair[line[0]].append(line[1:].strip())
    return " ".join(pair["-"]), " ".join(pair["+"])


def explained() -> dict[tuple[str, str, str], str]:
    """(module, line before, line after) -> why no test can tell them apart."""
    found = {}
    for block in EXPLAINED.read_text().split("\n\n") if EXPLAINED.exists() else ():
        rows = [row for row in block.strip().split("\n") if not row.startswith("#")]
        if len(rows) >= 4:
            found[rows[0], rows[1].removeprefix("- "), rows[2].removeprefix("+ ")] = " ".join(
                rows[3:]
            )
    return found


def of_diff(diff: str | None) -> tuple[str, str, str]:
    """(module, line before, line after), as `explained` has them."""
    module, before, after = (diff or "\n\n").split("\n", 2)
    return module, before.removeprefix("- "), after.removeprefix("+ ")


def pending(database, sample: int | None, seed: int, again: bool) -> Iterator:
    from cosmic_ray.work_item import TestOutcome

    items = sorted(database.work_items, key=lambda item: item.job_id)
    random.Random(seed).shuffle(items)
    found = dict(database.results)
    known = explained()  # which nothing tells apart: not asked again
    done = {
        job
        for job, r in found.items()
        if not again or r.test_outcome != TestOutcome.SURVIVED or of_diff(r.diff) in known
    }
    if again:
        items = [item for item in items if item.job_id in found]
    yield from (item for item in items[:sample] if item.job_id not in done)


def run(room: str, sample: int | None, seed: int, slots: int, again: bool) -> None:
    from cosmic_ray.work_db import WorkDB
    from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult

    preload()
    reached = measure(room)
    database = WorkDB(HOME / f"{room}.sqlite", WorkDB.Mode.create)
    make_session(room, database)
    waiting = pending(database, sample, seed, again)
    free = {slot: copy_tree(room, slot) for slot in range(slots)}
    running: dict[int, tuple] = {}
    known, counts = explained(), {"killed": 0, "survived": 0, "explained": 0}

    def finish(pid: int, code: int) -> None:
        slot, tree, item, source, after, _ = running.pop(pid)
        spec = item.mutations[0]
        (tree / spec.module_path).write_text(source)
        free[slot] = tree
        outcome = TestOutcome.SURVIVED if code == 0 else TestOutcome.KILLED
        before_line, after_line = changed_lines(source, after)
        diff = f"{spec.module_path}\n- {before_line}\n+ {after_line}"
        database.set_result(
            item.job_id, WorkResult(WorkerOutcome.NORMAL, test_outcome=outcome, diff=diff)
        )
        why = (str(spec.module_path), before_line, after_line) in known
        counts["killed" if code else "explained" if why else "survived"] += 1
        if not code and not why:
            print(
                f"\nsurvived, line {spec.start_pos[0]} ({spec.operator_name}): {diff}", flush=True
            )

    exhausted = False
    while running or not exhausted:
        while free and not exhausted:
            item = next(waiting, None)
            if item is None:
                exhausted = True
                break
            source, after = mutated(item.mutations[0])
            if after is None or after == source:
                database.set_result(item.job_id, WorkResult(WorkerOutcome.NO_TEST))
                continue
            slot, tree = free.popitem()
            (tree / item.mutations[0].module_path).write_text(after)
            tests, seconds = tests_of(room, item.mutations[0], source, reached)
            files, patience = HOME / f"{room}{slot}", Patience(reached["seconds"])
            runs = in_two(tests, item.mutations[0].module_path.stem, files)
            pid = in_child(tree, runs, files.with_suffix(".log"), [patience])
            limit = time.monotonic() + 60 + 6 * seconds
            running[pid] = (slot, tree, item, source, after, limit)
        time.sleep(0.05)
        for pid, (*_, limit) in list(running.items()):
            if time.monotonic() > limit:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)  # what it has left behind
                finish(pid, os.waitstatus_to_exitcode(status))
    print(f"\n{room}: {counts}")
    database.close()


def table() -> str:
    """Score per module over all sessions."""
    from cosmic_ray.work_db import WorkDB
    from cosmic_ray.work_item import TestOutcome

    known = explained()
    rows = [
        "| module | mutants | tried | killed | changes nothing | survived | score |",
        "|---|" + "---:|" * 6,
    ]
    for room in ROOMS:
        file = HOME / f"{room}.sqlite"
        if not file.exists():
            continue
        database = WorkDB(file, WorkDB.Mode.open)
        modules: dict[str, list[int]] = {}
        where = {item.job_id: str(item.mutations[0].module_path) for item in database.work_items}
        for module in where.values():
            modules.setdefault(module, [0, 0, 0, 0, 0])[0] += 1
        for job, result in database.results:
            if result.test_outcome is None:
                continue
            counts = modules[where[job]]
            counts[1] += 1
            if result.test_outcome != TestOutcome.SURVIVED:
                counts[2] += 1
            else:
                counts[3 if of_diff(result.diff) in known else 4] += 1
        modules[f"**{room}**"] = [sum(column) for column in zip(*modules.values(), strict=True)]
        for module, (made, tried, killed, same, left) in sorted(modules.items(), reverse=True):
            if tried:
                score = f"{killed / max(1, killed + left):.0%}"
                rows.append(
                    f"| {module} | {made} | {tried} | {killed} | {same} | {left} | {score} |"
                )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("room", choices=[*ROOMS, "table"])
    parser.add_argument("--sample", type=int, help="how many mutants; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slots", type=int, default=2, help="mutants at a time")
    parser.add_argument("--again", action="store_true", help="only what has survived so far")
    given = parser.parse_args()
    HOME.mkdir(exist_ok=True)
    if given.room == "table":
        print(table())
    else:
        if given.again:
            (HOME / f"{given.room}.reached.json").unlink(missing_ok=True)
        run(given.room, given.sample, given.seed, given.slots, given.again)


if __name__ == "__main__":
    main()
