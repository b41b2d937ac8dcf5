"""What MkDocs does beside its own: pages that lie outside docs/, and links as GitHub reads them.

A link is relative to the file in the repository that holds it. On the site README.md is the first
page, and docs/ the root.
"""

import posixpath
import re

from mkdocs.structure.files import File

# Files of the repository that are part of the site, by their places there.
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "sweeps/README.md": "sweeps/README.md",
    "checkpoints/README.md": "checkpoints/README.md",
    "examples/flower_update.py": "examples/flower_update.py",
    "examples/flower_filter.py": "examples/flower_filter.py",
    "examples/from_pytorch.py": "examples/from_pytorch.py",
}
_LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)")  # of a page or picture, up to its #


def on_files(files, config):
    """Adds the files that lie outside docs/."""
    root = posixpath.dirname(config["docs_dir"])
    for source, place in OUTSIDE.items():
        files.append(File.generated(config, place, abs_src_path=posixpath.join(root, source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns a page's links from places in the repository into places on the site."""
    place = page.file.src_uri
    own = next((a for a, b in OUTSIDE.items() if b == place), f"docs/{place}")

    def turn(match):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(own), match[2]))
        if match[2].endswith("/"):  # a folder, of which its README tells
            target = f"{target}/README.md"
        there = OUTSIDE.get(target, target.removeprefix("docs/"))
        return match[1] + posixpath.relpath(there, posixpath.dirname(place) or ".")

    return _LINK.sub(turn, markdown)
