"""Every developer verb. ``nox -l`` lists them; CONTRIBUTING.md says when to use which."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import nox

nox.needs_version = ">=2025.2"
# pip and virtualenv, not uv: a machine's pip may be set up to find a CPU build of torch.
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "typecheck", "tests"]

ROOT = Path(__file__).parent
PACKAGES = ("flute-kernels", "flute-quant", "flute-hf", "flute-vllm")  # in the order of their dependencies
PYTHON_FILES = ("noxfile.py", "packages", "examples", "benchmarks", "tests")
CONSTRAINTS = ("-c", "ci/constraints.txt")
WORK = ROOT / ".nox/work"
# For tests, which run beside other work: waiting threads that spin would take its cores, and their own.
PASSIVE = {"OMP_WAIT_POLICY": "passive"}

_ready: set[str] = set()


def run(session: nox.Session, program: str, *arguments: str, **options: Any) -> Any:
    """Run a program of the environment that the sessions with torch share; options as ``session.run``."""
    return session.run(str(WORK / "bin" / program), *arguments, external=True, **options)


def install(session: nox.Session, *more: str) -> None:
    """Install the four packages as a user gets them (built wheels, no links to the source), and ``more``.

    torch is large, so one environment in ``.nox/work`` serves every session that needs it. Delete it to
    begin anew.
    """
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    if "packages" not in _ready:
        session.run(sys.executable, "-m", "virtualenv", "--quiet", str(WORK), external=True)
        # Without dependencies first, so that the pins between the packages find each other.
        run(session, "python", *pip, "--no-deps", "--force-reinstall", *(f"./packages/{p}" for p in PACKAGES))
        run(session, "python", *pip, *CONSTRAINTS, *(f"./packages/{p}[test]" for p in PACKAGES))
        _ready.add("packages")
    if more:
        run(session, "python", *pip, *CONSTRAINTS, *more)


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """Quantize a small real model, generate with it, and print a table of quality, size and speed."""
    install(session, "-r", "examples/requirements.txt")
    run(session, "python", "examples/demo.py", *session.posargs)


@nox.session(venv_backend="none")
@nox.parametrize("package", [nox.param(name, id=name) for name in (*PACKAGES, "e2e")])
def tests(session: nox.Session, package: str) -> None:
    """The tests of every package, or of one: ``nox -s "tests(flute-quant)"``."""
    install(session, "-r", "examples/requirements.txt")
    folder = "tests/e2e" if package == "e2e" else f"packages/{package}/tests"
    env = dict(PASSIVE)
    if package == "flute-hf":
        # Makes the real model's folder where there is none yet; its last words are where that is.
        env["FLUTE_TEST_MODEL"] = run(session, "python", "examples/smollm2.py", silent=True).splitlines()[-1]
    run(session, "pytest", folder, *session.posargs, env=env)


@nox.session
def oldest(session: nox.Session) -> None:
    """The tests of flute-quant and flute-hf with the oldest Transformers that they support."""
    session.install("--no-deps", "--force-reinstall", *(f"./packages/{name}" for name in PACKAGES))
    constraints = ("-c", "ci/constraints-oldest.txt")
    session.install(*constraints, *(f"./packages/{name}[test]" for name in PACKAGES))
    for name in ("flute-quant", "flute-hf"):
        session.run("pytest", f"packages/{name}/tests", *session.posargs, env=PASSIVE)


@nox.session
def lint(session: nox.Session) -> None:
    """Style: ruff for Python, clang-format for C++. ``nox -s lint -- --fix`` repairs what it can."""
    session.install(*CONSTRAINTS, "ruff", "clang-format")
    fix = "--fix" in session.posargs
    session.run("ruff", "check", *(["--fix"] if fix else []), *PYTHON_FILES)
    session.run("ruff", "format", *([] if fix else ["--check"]), *PYTHON_FILES)
    sources = sorted(
        str(path)
        for path in (ROOT / "packages/flute-kernels/csrc").rglob("*")
        if path.suffix in {".h", ".inl", ".cpp", ".cu", ".cuh"}
    )
    session.run("clang-format", *(["-i"] if fix else ["--dry-run", "--Werror"]), *sources)


@nox.session(venv_backend="none")
def typecheck(session: nox.Session) -> None:
    """mypy --strict over the packages."""
    install(session, "mypy")
    for name in PACKAGES:
        run(session, "mypy", f"packages/{name}/src")


@nox.session
def sdist(session: nox.Session) -> None:
    """Source archive -> wheel -> import, for every package, with nothing of this checkout in between."""
    session.install(*CONSTRAINTS, "build")
    dist = Path(session.create_tmp()) / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    for name in PACKAGES:
        session.run("python", "-m", "build", "--outdir", str(dist), f"packages/{name}")
    session.install(
        *CONSTRAINTS, "--force-reinstall", "--no-deps", *(str(wheel) for wheel in sorted(dist.glob("*.whl")))
    )
    session.install(*CONSTRAINTS, *(str(wheel) for wheel in sorted(dist.glob("*.whl"))))
    session.run("python", str(ROOT / "ci/check_dist.py"), str(dist))


@nox.session
def wheels(session: nox.Session) -> None:
    """Build the wheels of ci/wheels.json into dist/: ``nox -s wheels``, or ``-- cpu`` for one label."""
    labels = {entry["label"]: entry for entry in json.loads((ROOT / "ci/wheels.json").read_text())["kernels"]}
    wanted = session.posargs or ["cpu"]
    for label in wanted:
        if label not in labels:
            session.error(f"{label!r} is not in ci/wheels.json; it has {', '.join(labels)}.")
    session.install(*CONSTRAINTS, "build")
    for label in wanted:
        session.run("python", "-m", "build", "--wheel", "--outdir", f"dist/{label}", "packages/flute-kernels")
    for name in PACKAGES[1:]:
        session.run("python", "-m", "build", "--wheel", "--outdir", "dist", f"packages/{name}")


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Measure: ``nox -s bench -- cpu`` for the CPU kernels and whole-model generation."""
    what, *rest = session.posargs or ["cpu"]
    install(session, "-r", "examples/requirements.txt")
    if what != "cpu":
        session.error(f"{what!r} is not a benchmark; there is cpu.")
    run(session, "python", "benchmarks/cpu_linears.py", *rest)
    run(session, "python", "benchmarks/generation.py", *rest)
