"""The built-in text: English that every CPython carries, no download."""

import ast
import functools
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

# Neither installed packages nor tests, and not lib2to3's 60 near-empty fixers; config-* holds build scripts.
SKIPPED_DIRECTORIES = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"}


@functools.cache
def builtin_documents() -> list[str]:
    """Gather the English text that every CPython carries, once a process.

    Returns:
        About 650 documents, 2.4 MB: each topic of `pydoc_data.topics`, then each standard-library module's docstrings,
        sorted, the same on every run of one Python. Nothing is imported but the topics, which are data.

    Raises ValueError where this Python comes without its library's source files.
    """
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_path("stdlib"))
    texts = [topics[name] for name in sorted(topics)]
    texts += [_docstrings_text(path, ".".join(path.relative_to(root).with_suffix("").parts)) for path in _modules(root)]
    documents = [text.strip() for text in texts if text.strip()]
    if not documents:
        raise ValueError(
            f"The built-in text is the standard library's docstrings, and {root} holds no source files; "
            "give data_files or dataset_name instead."
        )
    return documents


def _modules(root: Path) -> list[Path]:
    """Return the library's .py files, sorted by their parts, without tests and installed packages."""
    found = []
    for directory, below, names in os.walk(root):
        below[:] = [name for name in below if name not in SKIPPED_DIRECTORIES and not name.startswith("config-")]
        found += [Path(directory, name) for name in names if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def _docstrings_text(path: Path, module: str) -> str:
    """Return a module's docstrings as one text, its own first, then each class's and function's under its name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # bad on purpose
        return ""
    texts = [f"{name}\n\n{text}" if name else text for name, text in _docstrings(tree, "")]
    return "\n\n".join([module.removesuffix(".__init__"), *texts]) if texts else ""


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yield (qualified name in the module, cleaned docstring) in the order of the source."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = (ast.get_docstring(node) or "").strip()
        if text and not any("\ud800" <= character <= "\udfff" for character in text):
            yield name, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings(child, f"{name}.{child.name}".lstrip("."))
        elif not isinstance(child, ast.expr):  # a definition may stand under if and try, never in an expression
            yield from _docstrings(child, name)
