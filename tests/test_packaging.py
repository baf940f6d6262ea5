import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pml_htl

ROOT = Path(__file__).parents[1]

if sys.version_info >= (3, 11):
    import tomllib

    PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_package_only(wheel):
    files = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in files}
    assert tops == {"pml_htl", f"pml_htl-{pml_htl.__version__}.dist-info"}
    assert "pml_htl/py.typed" in files
    assert {f"pml_htl/{path.name}" for path in (ROOT / "pml_htl").glob("*.py")} <= set(files)


def test_the_wheel_works_outside_the_repository(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import pml_htl
assert pml_htl.__file__.startswith(sys.argv[1]), pml_htl.__file__
pml_htl.HTL(range(9), num_anchors=1, neighborhood_size=2, samples_per_class=1)
print(pml_htl.__version__)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == pml_htl.__version__


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_the_extras_are_pmls():
    extras = PROJECT["optional-dependencies"]
    for name in ("with-hooks", "with-hooks-cpu"):
        assert extras[name] == [f"pytorch-metric-learning[{name}]>=2.8,<3"]
    assert {"benchmarks", "dev"} <= extras.keys()
    assert "pytorch-metric-learning>=2.8,<3" in PROJECT["dependencies"]
    assert not any(re.search("faiss|record|tensorboard", package) for package in PROJECT["dependencies"])


def test_the_version_stands_in_the_changelog():
    assert f"## {pml_htl.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
