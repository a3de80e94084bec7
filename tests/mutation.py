"""Mutation testing: ``python -m tests.mutation --mutants 84 --seed 0 --out FILE`` (one JSON line a mutant, resumable).

The mutants are Cosmic Ray's (``pip install -e '.[mutation]'``), drawn evenly from the places that it can change; the
list is shortened to code that decides something: no annotations, arguments of decorators, messages, or bodies of
Triton kernels.

A copy of the tree in a temporary folder is changed, never the tree itself. Each mutant runs the fast tests of its
module (``TESTS``) in a process of its own, forked from one that has imported torch, until the first that fails. A run
that takes more than ``--limit`` seconds of processor time is stopped and counts as killed: ``--check`` first runs the
tests of all modules without a change, and tells their times.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosmic_ray.work_item import MutationSpec

# The fast tests of every module, and after "slow" single slow ones: what fails first where it is wrong stands first.
INTERPRETED = "slow test_suffix_scan.py::test_triton_forms_on_the_interpreter"
TESTS: dict[str, list[str]] = {
    "kernels/chunked_form.py": ["test_forms.py", "test_suffix_scan.py", "test_kernels_sm90.py", INTERPRETED],
    "kernels/cpu_scan.py": ["test_scan_forms.py::TestOnCpu"],
    "kernels/forms.py": ["test_forms.py", "test_scan_forms.py::TestChoice"],
    "kernels/ops.py": ["test_ops.py", "test_scan_forms.py"],
    "kernels/pins.py": ["test_pins.py", "test_forward.py"],
    "kernels/products.py": ["test_products.py", "test_scan_forms.py::TestProducts"],
    "kernels/reference.py": ["test_suffix_scan.py", "test_scan_forms.py"],
    "kernels/rows_form.py": ["test_forms.py", "test_suffix_scan.py", "test_kernels_sm90.py", INTERPRETED],
    "kernels/soft_cross_entropy.py": ["test_soft_cross_entropy.py"],
    "kernels/soft_cross_entropy_reference.py": ["test_soft_cross_entropy.py"],
    "kernels/suffix_scan.py": ["test_suffix_scan.py", "test_scan_forms.py", INTERPRETED],
    "kernels/vector_form.py": ["test_forms.py", "test_suffix_scan.py", "test_kernels_sm90.py", INTERPRETED],
    "lbi_compile/engines.py": ["test_engines.py"],
    "lbi_compile/backend.py": ["test_backend.py", "test_compile.py"],
    "lbi_compile/running.py": ["test_running.py", "test_transform.py", "test_exactness.py", "test_forward.py"],
    "lbi_compile/region.py": ["test_transform.py", "test_lanes.py", "test_interfaces_lanes.py"],
    "lbi_compile/scanning.py": ["test_engines.py", "test_compile.py"],
    "lbi_compile/newton.py": ["test_newton.py"],
    "lbi_compile/diagnostics.py": ["test_diagnostics.py", "test_products.py"],
    "lbi_compile/staleness.py": ["test_reliability.py", "test_errors.py", "test_state.py"],
    "lbi_compile/gate.py": ["test_gate.py", "test_reliability.py"],
    "passes/adjoint_scan.py": ["test_scan_backward.py"],
    "passes/alike.py": ["test_alike.py", "test_batch_regions.py"],
    "passes/axes.py": ["test_axes.py", "test_axis_positions.py"],
    "passes/axis_calls.py": ["test_axis_views.py", "test_axis_rules.py", "test_axes.py"],
    "passes/axis_probes.py": ["test_axis_probes.py"],
    "passes/axis_recurrent.py": ["test_axis_views.py", "test_axis_rules.py", "test_axes.py"],
    "passes/axis_routing.py": ["test_axis_routing.py"],
    "passes/axis_rules.py": ["test_axis_rules.py"],
    "passes/axis_views.py": ["test_axis_views.py", "test_axis_rules.py"],
    "passes/axis_windows.py": ["test_axis_windows.py"],
    "passes/axis_writes.py": ["test_axis_writes.py"],
    "passes/batch_cotangents.py": ["test_batch_cotangents.py"],
    "passes/batch_regions.py": ["test_batch_regions.py"],
    "passes/casts.py": ["test_casts.py"],
    "passes/costs.py": ["test_costs.py"],
    "passes/critical_path.py": ["test_critical_path.py", "test_forward.py"],
    "passes/evaluate.py": ["test_evaluate.py", "test_reliability.py"],
    "passes/forward_jacobians.py": ["test_forward_jacobians.py", "test_jacobian_slices.py", "test_forward.py"],
    "passes/index_chunks.py": ["test_index_chunks.py", "test_jacobians.py", "test_jacobian_budget.py"],
    "passes/insert.py": ["test_insert.py"],
    "passes/jacobian_budget.py": ["test_jacobian_budget.py"],
    "passes/jacobian_slices.py": ["test_jacobian_slices.py"],
    "passes/jacobians.py": ["test_jacobians.py", "test_scan_backward.py", "test_jacobian_budget.py"],
    "passes/lanes.py": ["test_lanes.py"],
    "passes/layouts.py": ["test_layouts.py"],
    "passes/linearity.py": ["test_linearity.py", "test_scan_backward.py"],
    "passes/liveness.py": ["test_liveness.py"],
    "passes/names.py": ["test_names.py"],
    "passes/ordering.py": ["test_ordering.py", "test_scan_backward.py"],
    "passes/partition.py": ["test_partition.py"],
    "passes/positions.py": ["test_positions.py"],
    "passes/region_rules.py": ["test_region_rules.py", "test_batch_regions.py"],
    "passes/region_sums.py": ["test_region_sums.py", "test_batch_regions.py"],
    "passes/repeats.py": ["test_repeats.py"],
    "passes/scan_backward.py": ["test_scan_backward.py", "test_jacobian_budget.py"],
    "passes/separators.py": ["test_separators.py"],
    "passes/splicing.py": ["test_splicing.py", "test_scan_backward.py"],
    "passes/validate.py": ["test_validate.py"],
    "passes/vertex_cut.py": ["test_vertex_cut.py"],
    "passes/windows.py": ["test_windows.py", "test_lanes.py"],
}
# Not the plugins of pytest: it has to be the first to import those.
_WARM = ("torch", "torch._dynamo", "torch.export", "numpy", "networkx", "sympy", "pytest", "rich.console")


# Exit code of a process that ran no test.
_NO_RESULT = 99


def mutants(path: Path) -> dict[tuple[int, int], list[MutationSpec]]:
    """What Cosmic Ray can change in a file, by line and column."""
    from cosmic_ray.commands.init import init
    from cosmic_ray.work_db import WorkDB, use_db

    skipped = list(_undecided(ast.parse(path.read_text())))
    found = defaultdict(list)
    with tempfile.TemporaryDirectory() as place, use_db(str(Path(place) / "all.sqlite"), WorkDB.Mode.create) as known:
        init([path], known, {})
        for item in known.work_items:
            one = item.mutations[0]
            if not any(begin <= one.start_pos < end for begin, end in skipped):
                found[one.start_pos].append(one)
    return dict(found)


def _undecided(node: ast.AST) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where text stands that decides nothing: from line and column to line and column."""
    kernel = isinstance(node, ast.FunctionDef) and any("triton" in ast.unparse(one) for one in node.decorator_list)
    if kernel or isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert | ast.Import | ast.ImportFrom):
        yield _span(node)
        return
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST):
                continue
            if name in ("annotation", "returns", "decorator_list", "type_params"):
                yield _span(child)
            else:
                yield from _undecided(child)


def _span(node: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)


def sample(tree: Path, count: int, *, seed: int) -> list[tuple[str, MutationSpec]]:
    """Some mutants of the modules of a tree: one of each, the rest from all places alike.

    Args:
        tree: Where the modules lie.
        count: How many.
        seed: Of the choice.
    """
    choose = random.Random(seed)
    every = {path: mutants(tree / path) for path in TESTS}
    first = [(path, choose.choice(sorted(places))) for path, places in every.items() if places]
    rest = [(path, place) for path, places in every.items() for place in sorted(places) if (path, place) not in first]
    places = first[:count] + choose.sample(rest, max(min(count - len(first), len(rest)), 0))
    choose.shuffle(places)
    return [(path, choose.choice(every[path][place])) for path, place in places]


def survivors(tree: Path, rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, MutationSpec]]:
    """The mutants that survived, found again by their line and column where lines have moved since."""
    found = []
    for row in rows:
        if row["result"] == "passed":
            lines = (tree / row["path"]).read_text().splitlines()
            every = [one for places in mutants(tree / row["path"]).values() for one in places]
            same = [one for one in every if one.operator_name.endswith(f"/{row['operator']}")]
            here = [
                one
                for one in same
                if one.start_pos[1] == row["column"] and lines[one.start_pos[0] - 1].strip() == row["was"]
            ]
            # one place may be changed in several ways, which stand one after another
            here.sort(key=lambda one: abs(one.occurrence - row["occurrence"]))
            found += [(row["path"], one) for one in here[:1]]
    return found


def copied(root: Path, to: Path) -> None:
    """Copy what git knows of a tree, and what it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (root / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, to / name)


def run(tree: Path, tests: Sequence[str], *, limit: int, log: Path) -> tuple[str, float]:
    """Run tests of a tree in a forked process.

    Returns:
        ``"passed"``, ``"failed"``, ``"stopped"`` at the limit or ``"broken"`` where no test ran; and seconds of
        processor time.
    """
    process = os.fork()
    if process == 0:
        try:
            code = _in_child(tree, tests, limit=limit, log=log)
        except BaseException:
            traceback.print_exc()
            code = _NO_RESULT
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # what the parent has open is not the child's to close
    _, status, used = os.wait4(process, 0)
    seconds = used.ru_utime + used.ru_stime
    if os.WIFSIGNALED(status):
        return ("stopped" if seconds >= limit - 1 else "failed"), seconds
    return {0: "passed", 1: "failed", 2: "failed"}.get(os.waitstatus_to_exitcode(status), "broken"), seconds


def _in_child(tree: Path, tests: Sequence[str], *, limit: int, log: Path) -> int:
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    root = os.getcwd()
    os.chdir(tree)
    sys.dont_write_bytecode = True  # a change within one second would be taken for none
    os.environ.update(PYTHONDONTWRITEBYTECODE="1", PYTHONPATH=str(tree))
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "lbi_compile")]:
        del sys.modules[name]
    sys.path[:] = [str(tree), *(place for place in sys.path if place not in ("", ".", root))]
    import pytest

    options = ["-x", "-q", "-p", "no:cacheprovider", "-o", "timeout=0", "--rootdir", str(tree)]
    slow = [name.removeprefix("slow ") for name in tests if name.startswith("slow ")]
    code = pytest.main([*options, *(str(tree / "tests" / name) for name in tests if not name.startswith("slow "))])
    if not code and slow:
        code = pytest.main([*options, "-m", "slow", *(str(tree / "tests" / name) for name in slow)])
    return int(code)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--mutants", type=int, default=84)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=120, help="seconds of processor time for one mutant")
    parser.add_argument("--share", default="1/1", help="2/3: the second of three processes that share the work")
    parser.add_argument("--survivors", action="store_true", help="run those again that survived")
    parser.add_argument("--only", default="", help="modules whose path has this in it")
    parser.add_argument("--check", action="store_true", help="run the tests without a change and tell their times")
    parser.add_argument("--out", type=Path, default=Path("mutation.jsonl"))
    options = parser.parse_args(arguments)
    root = Path.cwd()
    out = options.out.resolve()
    for name in _WARM:
        __import__(name)
    with tempfile.TemporaryDirectory() as place:
        tree, log = Path(place) / "tree", Path(place) / "log"
        tree.mkdir()
        copied(root, tree)
        chosen = [path for path in TESTS if options.only in path]
        if options.check:
            return _check(tree, chosen, limit=options.limit, log=log)
        rows = _rows(out)
        part, parts = map(int, options.share.split("/"))
        drawn = (
            survivors(tree, rows.values()) if options.survivors else sample(tree, options.mutants, seed=options.seed)
        )
        for path, mutant in drawn[part - 1 :: parts]:
            key = (path, *mutant.start_pos, mutant.operator_name, mutant.occurrence)
            if (key in rows and not options.survivors) or path not in chosen:
                continue
            rows[key] = _tried(tree, path, mutant, limit=options.limit, log=log)
            with out.open("a") as file:
                file.write(json.dumps(rows[key]) + "\n")
            told = rows[key]
            print(f"{told['result']:8} {told['seconds']:6.1f} s  {path}:{told['line']}  {told['operator']}", flush=True)
    counts = Counter(row["result"] for row in rows.values())
    killed = counts["failed"] + counts["stopped"]
    print(f"{killed} of {len(rows)} killed ({killed / max(len(rows), 1):.0%}): {dict(counts)}")
    return 1 if counts["broken"] else 0


def _tried(tree: Path, path: str, mutant: MutationSpec, *, limit: int, log: Path) -> dict[str, Any]:
    """One row."""
    from cosmic_ray.mutating import use_mutation
    from cosmic_ray.plugins import get_operator

    begin = time.perf_counter()
    operator = get_operator(mutant.operator_name)(**mutant.operator_args)
    with use_mutation(tree / path, operator, mutant.occurrence) as (was, now):
        result, seconds = run(tree, TESTS[path], limit=limit, log=log)
    lines = [
        (before.strip(), after.strip())
        for before, after in zip(was.splitlines(), now.splitlines(), strict=False)
        if before != after
    ]
    told = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(("FAILED", "ERROR"))]
    row = {"path": path, "line": mutant.start_pos[0], "column": mutant.start_pos[1]}
    row |= {"operator": mutant.operator_name.partition("/")[2], "occurrence": mutant.occurrence}
    row |= {"was": lines[0][0], "now": lines[0][1], "result": result, "seconds": round(seconds, 1)}
    return row | {"waited": round(time.perf_counter() - begin, 1), "by": told[0][:160] if told else ""}


def _rows(out: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    found = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return {
        (row["path"], row["line"], row["column"], f"core/{row['operator']}", row["occurrence"]): row for row in found
    }


def _check(tree: Path, paths: Sequence[str], *, limit: int, log: Path) -> int:
    worst = 0
    for tests in dict.fromkeys(tuple(TESTS[path]) for path in paths):
        result, seconds = run(tree, tests, limit=limit, log=log)
        print(f"{result:8} {seconds:6.1f} s  {' '.join(tests)}", flush=True)
        if result == "broken":
            print(log.read_text(errors="replace")[-2000:])
        worst |= result != "passed"
    return worst


if __name__ == "__main__":
    sys.exit(main())
