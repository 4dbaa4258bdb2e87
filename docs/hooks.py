"""What the site needs beyond Markdown: links out of docs/, code blocks that parse, docstrings as Markdown.

Used twice: mkdocs calls the `on_` functions, and griffe, which reads the docstrings, the class below.
"""

import re
from pathlib import Path

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
BESIDE = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
)  # pages of the site that lie in the root
LINK = re.compile(r"\[([^\]]*)\]\(([^)#]+)(#[^)]*)?\)")
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Warns|Source):\s*(.*)")
ITEM = re.compile(r"    (\*{0,2}[\w.]+(?:, \*{0,2}[\w.]+)*): (.*)")


def on_files(files, config):
    for name in BESIDE:
        files.append(File.generated(config, name, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown, page, **_):
    """A link to a file outside the site becomes the file's name."""
    for block in PYTHON.findall(markdown):
        try:
            compile(block, page.file.src_uri, "exec")
        except SyntaxError as error:
            raise PluginError(f"{page.file.src_uri}: {error}") from error
    folder = "." if page.file.src_uri in BESIDE else "docs"

    def inside(match):
        text, target, anchor = match[1], match[2], match[3] or ""
        if target.startswith("https://"):
            return match[0]
        path = (ROOT / folder / page.file.src_uri).parent / target
        if not path.exists():
            raise PluginError(f"{page.file.src_uri}: {target} does not exist")
        path = path.resolve().relative_to(ROOT)
        if path.parts[0] == "docs":
            path = path.relative_to("docs")
        elif str(path) not in BESIDE:
            return f"{text} (`{path}`)" if text.strip("`") != str(path) else f"`{path}`"
        up = "../" * (len(Path(page.file.src_uri).parts) - 1)
        return f"[{text}]({up}{path}{anchor})"

    return LINK.sub(inside, markdown)


class PlainDocstrings(griffe.Extension):
    """The sections of our docstrings as Markdown lists; indented formulas are code blocks as they stand."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    lines, section = [], None
    for line in docstring.splitlines():
        head, item = SECTION.fullmatch(line), ITEM.fullmatch(line)
        if head:
            section = head[1]
            lines += ["", f"**{section}:** {_escaped(head[2])}".rstrip(), ""]
        elif line and not line.startswith(" "):
            section = None
            lines.append(_escaped(line))
        elif section is None:
            lines.append(line)
        elif item and section not in ("Returns", "Source"):
            lines.append(f"- `{item[1]}`: {_escaped(item[2])}")
        else:
            lines.append(_escaped(line[4:]))
    return "\n".join(lines)


def _escaped(line):
    """A name in <brackets> is no HTML."""
    return line if "`" in line else line.replace("<", "&lt;")
