"""The README's Python works as it stands, in both languages."""

import contextlib
import io
import pkgutil
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import kuosan as ks
from kuosan.solvers import DDIM, Row, Solver

ROOT = Path(__file__).parent.parent


def python_of(name: str) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text("utf-8"), flags=re.S)
    return block


def without_comments(code: str) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return [t.string for t in tokens if t.type not in (tokenize.COMMENT, tokenize.NL)]


def test_the_example_runs(capsys):
    """All but its last line, which wants a trained run: tests/test_run.py loads one."""
    lines = python_of("README.md").splitlines()
    assert "ks.load" in lines[-1]
    names: dict = {}
    exec("\n".join(lines[:-1]), names)
    assert names["x"].shape == (64, 1)
    assert names["table"].evaluations == 10


def test_both_languages_show_the_same_example():
    assert without_comments(python_of("README.md")) == without_comments(python_of("README.zh.md"))


@pytest.mark.parametrize(("one", "other"), [("README.md", "README.zh.md"), ("docs/theory.md", "docs/theory.zh.md")])
def test_both_languages_name_the_same_functions_files_and_commands(one, other):
    """What stands in backticks is code, and code is not translated."""
    named = [set(re.findall(r"`([^`\n]+)`", (ROOT / name).read_text("utf-8"))) for name in (one, other)]
    assert named[0] == named[1]


def test_the_solver_of_the_architecture_page_is_ddim():
    """Euler's rule on the straight line is DDIM: in form x0, coefficient by coefficient."""
    names = {"dataclass": dataclass, "Solver": Solver, "Row": Row}
    exec(python_of("docs/architecture.md"), names)
    process = ks.Process(ks.schedules.Cosine())
    mine = names["MyEuler"]().table(process, steps=6).read_as("x0", process)
    for a, b in zip(mine.dense(), DDIM().table(process, steps=6).dense(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def named_in(document: str) -> set[str]:
    """The dotted names in backticks, without their arguments: of modules, classes and files."""
    text = (ROOT / document).read_text("utf-8")
    return set(re.findall(r"`([A-Za-z_/]+(?:\.[A-Za-z_]+)+)(?:\([^`\n]*\))?`", text))


@pytest.mark.parametrize("document", ["docs/theory.md", "docs/architecture.md", "docs/samplers.md"])
def test_what_the_documents_name_exists(document):
    """A row that points at a function or a test which is gone is worse than none."""
    files = {path.name for folder in ("src", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.*")}
    files |= {path.name for path in ROOT.iterdir()}
    found = named_in(document)
    assert found
    for name in found:
        if name.endswith((".py", ".md", ".txt", ".json")):
            assert name.split("/")[-1] in files, name
            continue
        assert exists(name.removeprefix("ks.").removeprefix("kuosan.")), name


def exists(name: str) -> bool:
    """Whether a name is one of the package, or of a module that names its classes."""
    for home in (
        "kuosan",
        "kuosan.solvers",
        "kuosan.runs",
        "kuosan.kernels",
        "kuosan.variance",
        "kuosan.bound",
        "kuosan.discrete",
        "kuosan.discrete.rules",
    ):
        with contextlib.suppress(AttributeError, ModuleNotFoundError):
            pkgutil.resolve_name(f"{home}.{name}")
            return True
    return False
