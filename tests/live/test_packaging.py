"""The wheel and the sdist install in a clean environment and work there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CLEAN = {
    name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ
}
CLEAN |= {name: value for name, value in os.environ.items() if name.lower().endswith("proxy")}
CLEAN |= {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}


def run(*arguments: object, cwd: Path) -> str:
    done = subprocess.run(
        [str(argument) for argument in arguments],
        cwd=cwd,
        env=CLEAN,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files under version control (and those about to be), without anything built."""
    copy = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel built from it."""
    where = tmp_path_factory.mktemp("dist")
    if not shutil.which("gcc"):
        pytest.skip("no gcc: apt-get install gcc")
    run(sys.executable, "-m", "build", "-q", "--outdir", where, source, cwd=where)
    return where


def _only(files: Sequence[Path]) -> Path:
    (one,) = files
    return one


def test_wheel_holds_what_it_should(built: Path) -> None:
    wheel = _only(list(built.glob("*.whl")))
    assert "linux_x86_64" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "cli.py" in names
    assert "snapshot/py.typed" in names
    assert any(name.startswith("snapshot/kernel/_native") for name in names)
    for module in (ROOT / "snapshot").rglob("*.py"):
        assert str(module.relative_to(ROOT)) in names
    assert not [name for name in names if name.startswith(("tests/", "bench/"))]


def test_sdist_holds_the_c_core(built: Path) -> None:
    with tarfile.open(_only(list(built.glob("*.tar.gz")))) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    for source in (ROOT / "snapshot/kernel/native").glob("*.[ch]"):
        assert str(source.relative_to(ROOT)) in names
    assert "README.md" in names


@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_it_installs_and_works_in_a_clean_environment(
    kind: str, built: Path, tmp_path: Path
) -> None:
    environment = tmp_path / "venv"
    run(sys.executable, "-m", "venv", environment, cwd=tmp_path)
    package = _only(list(built.glob(kind)))
    pip = (environment / "bin/python", "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "-q", package, cwd=tmp_path)
    snap = environment / "bin/snap"
    assert "take" in run(snap, "--help", cwd=tmp_path)
    assert run(snap, "--version", cwd=tmp_path).startswith("snap ")
    checked = subprocess.run(
        [snap, "check", "--json"], cwd=tmp_path, env=CLEAN, capture_output=True, check=False
    )
    items = json.loads(checked.stdout)["items"]
    assert "self-test" not in [item["item"] for item in items]  # it could be run at all
    script = "import snapshot, snapshot.take, snapshot.restore; print(snapshot.__file__)"
    assert str(environment) in run(environment / "bin/python", "-c", script, cwd=tmp_path)
