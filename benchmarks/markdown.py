"""Texts of anyone's in Markdown."""


def cell(text: str, most: int = 80) -> str:
    """A text of anyone's as one cell of a table: one line, and nothing in it that Markdown takes for its own."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    text = text if len(text) <= most else text[: most - 1] + "…"
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#!~$" else c for c in text)
