import email
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pml_htl

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_the_package_only(wheel):
    files = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in files}
    assert tops == {"pml_htl", f"pml_htl-{pml_htl.__version__}.dist-info"}
    assert "pml_htl/py.typed" in files
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "pml_htl").rglob("*.py")} <= set(files)


@pytest.mark.slow
def test_the_page_of_a_package_index_links_to_nothing_that_is_not_there(wheel):
    name = next(name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("METADATA"))
    page = email.message_from_bytes(zipfile.ZipFile(wheel).read(name)).get_payload(decode=True).decode()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert page.startswith(readme[:1000]) and "benchmarks/README.md has all methods" in page and "![" not in page
    links = re.findall(r"\]\(([^)]*)\)", page)
    assert links and all(link.startswith("https://") for link in links)


@pytest.mark.slow
def test_the_wheel_works_outside_the_repository(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import pml_htl
assert pml_htl.__file__.startswith(sys.argv[1]), pml_htl.__file__
pml_htl.HTL(range(9), num_anchors=1, neighborhood_size=2, samples_per_class=2)
print(pml_htl.__version__)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == pml_htl.__version__


@pytest.mark.slow
def test_the_extras_are_pmls(wheel):
    name = next(name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("METADATA"))
    metadata = email.message_from_string(zipfile.ZipFile(wheel).read(name).decode())
    required = [line.replace(" ", "") for line in metadata.get_all("Requires-Dist")]
    for extra in ("with-hooks", "with-hooks-cpu"):
        theirs = [line.split(";")[0] for line in required if line.endswith(f"extra=='{extra}'")]
        assert theirs == [f"pytorch-metric-learning[{extra}]<3,>=2.8"]
    assert {"benchmarks", "dev"} <= set(metadata.get_all("Provides-Extra"))
    always = [line for line in required if ";" not in line]
    assert "pytorch-metric-learning<3,>=2.8" in always
    assert not any(re.search("faiss|record|tensorboard", line) for line in always)


def test_the_version_stands_in_the_changelog():
    assert f"## {pml_htl.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
