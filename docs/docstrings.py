"""What mkdocstrings does not show by itself: roles such as ``:class:`X```, and sections named ``Example:``."""

import re

import griffe

ROLE = re.compile(r":(?:class|func|meth|attr|mod|data):<code>~?([^<]*)</code>")


def on_page_content(html, **_):
    """A hook of mkdocs: roles as plain code."""
    return ROLE.sub(r"<code>\1</code>", html)


class Examples(griffe.Extension):
    """The Google parser knows the plural only, and would show a doctest as quotations."""

    def on_instance(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
