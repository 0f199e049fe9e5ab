"""Builds docs/ as a site: `python docs/build_site.py` (make docs), in build/site.

Links out of docs/ work where the pages are read as files of the repository; on the site, pictures are copied and other
files are named by their path. Exits with 1 for a broken link, a missing anchor, and a page that nav does not list.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURES = "benchmarks/results"
OUTSIDE = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")
"""A link out of docs/: whether it is an image, its text, its path in the repository."""


def write_pages(project: Path) -> list[str]:
    """Write build/pages as the site needs it; returns what is wrong with links out of docs/ and with nav."""
    pages = project / "build/pages"
    wrong = []
    shutil.rmtree(pages, ignore_errors=True)
    shutil.copytree(project / "docs", pages, ignore=shutil.ignore_patterns("*.py", ".*", "data", "runs"))
    (pages / PICTURES).mkdir(parents=True)
    for picture in (project / PICTURES).glob("*.png"):
        shutil.copy(picture, pages / PICTURES)
    nav = (project / "mkdocs.yml").read_text()
    for page in sorted(pages.rglob("*.md")):
        name = page.relative_to(pages).as_posix()
        text = page.read_text()
        for _, _, path in OUTSIDE.findall(text):
            if not (project / path).exists():
                wrong.append(f"docs/{name}: a link to {path}, which does not exist")
        if not re.search(rf": {re.escape(name)}$", nav, re.MULTILINE):
            wrong.append(f"docs/{name}: not in nav of mkdocs.yml")
        page.write_text(OUTSIDE.sub(_on_site, text))
    return wrong


def _on_site(link: re.Match[str]) -> str:
    image, text, path = link.groups()
    if image:
        return f"![{text}]({path})"
    if path in text:
        return text
    return f"{text} (`{path}`)"


def main(project: Path = ROOT) -> int:
    """Write the pages and build the site; returns the exit status."""
    wrong = write_pages(project)
    for problem in wrong:
        print(problem, file=sys.stderr)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(project / "mkdocs.yml")]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        print(re.sub(r"\x1b\[[0-9;]*m", "", built.stdout + built.stderr), file=sys.stderr)
    return int(bool(wrong or built.returncode))


if __name__ == "__main__":
    sys.exit(main())
