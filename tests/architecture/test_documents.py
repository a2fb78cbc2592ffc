"""What documents name exists: files, folders, tests, commands and links.

Paths may start at the root of the repository or of the package. A decision may name what is gone as
"formerly `path`".
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mowe_ray.config.load import parse_yaml

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mowe_ray"
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("*/*/README.md")]
)
FOLDERS = "|".join(
    [
        *("mowe_ray", "tests", "docs", "benchmarks", "cluster", "sweeps", r"\.github"),
        *sorted(folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").is_file()),
    ]
)
PATH = re.compile(rf"(?<![\w/.:~])(?:{FOLDERS})/[\w./*-]*[\w*/]")
FILE = re.compile(r"`([\w-]+\.(?:py|sh))(?:::(\w+?)(\.*))?`")
MODULE = re.compile(r"python -m (mowe_ray\.\w+)")
LINK = re.compile(r"\]\(([^)#]+?)(?:#[^)]*)?\)")
PLACEHOLDER = re.compile(r"\b[A-Z]{2,}\b")  # benchmarks/NAME.py


def text_of(document: Path) -> str:
    return re.sub(r"formerly `[^`]*`", "", document.read_text(encoding="utf-8"))


def exists(path: str) -> bool:
    return any(next(root.glob(path), None) is not None for root in (ROOT, PACKAGE))


def by_name(name: str) -> list[Path]:
    folders = (PACKAGE, *(ROOT / top for top in ("tests", "benchmarks", "cluster", "sweeps", "examples")))
    return [path for folder in folders for path in folder.rglob(name)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_commands_and_links_exist(document: Path) -> None:
    text = text_of(document)
    missing = [path for path in PATH.findall(text) if not PLACEHOLDER.search(path) and not exists(path)]
    missing += [name for name in MODULE.findall(text) if not (PACKAGE / f"{name.split('.')[1]}.py").is_file()]
    missing += [to for to in LINK.findall(text) if "://" not in to and not (document.parent / to).exists()]
    for name, test, more in FILE.findall(text):
        found = by_name(name)
        definition = f"^def {test}" + ("" if more else r"\b") if test else ""
        if not any(re.search(definition, path.read_text(encoding="utf-8"), re.MULTILINE) for path in found):
            missing.append(f"{name}::{test}{more}" if test else name)
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_configurations_in_documents_can_be_read(document: Path) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", text_of(document), re.DOTALL):
        assert parse_yaml(block, document.name)


def test_files_named_in_code_exist() -> None:
    path = re.compile(rf"(?<![\w/.])(?:{FOLDERS})/[\w/]+\.(?:py|md)\b|(?<=`)\w+\.py(?=`)")
    missing = {}
    for file in [*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "cluster").glob("*.py")]:
        named = path.findall(file.read_text(encoding="utf-8"))
        if gone := [name for name in named if not (exists(name) if "/" in name else by_name(name))]:
            missing[str(file.relative_to(ROOT))] = gone
    assert missing == {}


def tree() -> Iterator[list[str]]:
    """Every name of the tree in the README, as the paths it may have.

    A line is names, two spaces or more, and a text; the text names files of the folder, or of one of the folders.
    """
    block = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Where things are")[2].split("```")[1]
    above: list[tuple[int, str]] = []
    for line in block.strip("\n").splitlines():
        depth = len(line) - len(line.lstrip())
        above = [(at, folder) for at, folder in above if at < depth]
        parent = "".join(folder for _, folder in above)
        names, _, text = line.strip().partition("  ")
        paths = [parent + name for name in names.split(", ")]
        yield from ([path] for path in paths)
        folders = [path for path in paths if path.endswith("/")] or [parent]
        yield from ([folder + name for folder in folders] for name in re.findall(r"[\w*]+\.py|\w+/", text))
        if len(paths) == 1 and names.endswith("/"):
            above.append((depth, names))


def test_the_tree_in_the_readme_is_that_of_the_package() -> None:
    named = list(tree())
    assert [paths for paths in named if not any(next(ROOT.glob(path), None) for path in paths)] == []
    folders = {f"{file.parent.relative_to(ROOT)}/" for file in PACKAGE.rglob("*.py")}
    assert folders - {path for paths in named for path in paths} == set()


def test_known_issues_are_listed_with_their_reports() -> None:
    folder = ROOT / "tests" / "known_issues"
    table = text_of(folder / "README.md")
    report = re.compile(r"[\w.-]+/[\w.-]+#\d+|github\.com/\S+/\d+|CVE-\d+")
    for file in folder.glob("test_*.py"):
        assert f"`{file.name}`" in table
        assert report.search(text_of(file).split('"""')[1]), f"{file.name} names no public report"


def test_the_readme_is_short() -> None:
    assert 150 <= len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
