"""Percent scripts as pages: cells of Markdown as they are, cells of Python as code."""

from __future__ import annotations

import re


def page(script: str) -> str:
    """The page of a script in the percent format, whose cells begin with `# %%`."""
    parts = []
    for head, body in re.findall(r"^# %%(.*)\n((?:(?!# %%).*\n?)*)", script, re.MULTILINE):
        if "[markdown]" in head:
            parts.append(re.sub(r"^# ?", "", body, flags=re.MULTILINE).strip())
        elif body.strip():
            parts.append(f"```python\n{body.strip()}\n```")
    return "\n\n".join(parts) + "\n"
