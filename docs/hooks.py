"""Links of the pages to files of the repository, which work where the pages are read as files, on the built site."""

import logging
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PICTURES = "benchmarks/results"
OUTSIDE = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)#]+)\)")
"""A link out of docs/: whether it is an image, its text, its path in the repository."""

log = logging.getLogger("mkdocs.hooks")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pictures that benchmarks made."""
    for picture in sorted((ROOT / PICTURES).glob("*.png")):
        files.append(File.generated(config, f"{PICTURES}/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Show those pictures, and name other files by their path. A missing file is a warning, which --strict refuses."""

    def replace(link: re.Match[str]) -> str:
        image, text, path = link.groups()
        if not (ROOT / path).exists():
            log.warning("a page links to %s, which is not in the repository", path)
        if image:
            return f"![{text}]({path})"
        return text if path in text else f"{text} (`{path}`)"

    return OUTSIDE.sub(replace, markdown)
