"""What mkdocs.yml asks for when the site is built: README as its front page, and links that leave docs/.

On GitHub the pages link to files of the repository by relative paths. On the site these go to the project's address,
whose one home is setup.cfg.
"""

import re
from configparser import ConfigParser
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]


def source_url():
    """The repository's address: `Source` of project_urls in setup.cfg."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return re.search(r"^Source *= *(\S+)", config["metadata"]["project_urls"], flags=re.MULTILINE)[1]


def on_files(files, config):
    """README.md is the site's index.md, its links seen from docs/."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\((?!https?:|#)", "](../", text).replace("](../docs/", "](")
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """README is index.md here; other files outside docs/ are in the repository."""
    markdown = re.sub(r"\]\(\.\./README\.md(#[^)]*)?\)", r"](index.md\1)", markdown)
    return re.sub(r"\]\(\.\./", f"]({source_url()}/blob/main/", markdown)
