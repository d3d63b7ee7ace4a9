"""Errors without the values they contain: SQL parameters, rejected input, the data of a `UserError`."""

from __future__ import annotations

import re
from collections.abc import Iterator

CUT = "..."

_PARTS = (
    # What SQLAlchemy adds to the message of a driver.
    (r"(?s)\[parameters: .*?(?=\n\(Background|\Z)", rf"[parameters: {CUT}]"),
    # What the server adds: values of a row, of a key, of a parameter; the line of the statement that failed.
    (r"(?m)^(DETAIL|CONTEXT|HINT|LINE \d+|QUERY|WHERE):.*(?:\n(?![A-Z]+:|\[|\().*)*", rf"\1: {CUT}"),
    # What a server or a driver says of a value that it cannot read.
    (r"(?s)(invalid input (?:syntax|value) for [\w ]+): .*?(?=\n|\Z)", rf"\1: {CUT}"),
    (r"(?s)(invalid input for query argument \$\d+: ).*?(?= \(|\n|\Z)", rf"\1{CUT}"),
    (r"(value )\"[^\n]*\"( is out of range)", rf"\1{CUT}\2"),
    # What pydantic adds, up to the end of an entry, because the input itself may contain what follows it.
    (
        r"(?s)input_value=.*?(, input_type=\w+\])(?=\n    For further information visit |\Z)",
        rf"input_value={CUT}\1",
    ),
    (r"(?s)input_value=(?!\.\.\.,).*", f"input_value={CUT}"),
    (r"(Input tag )'[^\n]*'( found using)", rf"\1{CUT}\2"),
)
"""Parts of messages that hold values, with what is left of them."""

_STATEMENT = re.compile(r"(?s)\[SQL: .*?(?=\n\[parameters|\n\(Background|\Z)")
_LITERAL = re.compile(r"'(?:[^']|'')*'")
_DATA_OF_CHILD = re.compile(r"(?s)(failed: UserError): .*")

_FRAME = re.compile(r"(?P<indent>\s*)File \"(?P<file>.*)\", line \d+(?:, in .*)?$")
_MARKER = re.compile(
    r"Traceback \(most recent call last\):$|Exception Group Traceback \(most recent call last\):$"
    r"|The above exception was the direct cause of the following exception:$"
    r"|During handling of the above exception, another exception occurred:$"
)
_REPEATED = re.compile(r"\s*\[Previous line repeated \d+ more times?\]$")
_CLASS = re.compile(r"[A-Za-z_][\w.<>]*(?=:|$)")
_MARGIN = re.compile(r"(?:\s*[|+](?:-+(?: \d+ -+)?| )?)*")


def message_of(name: str | None, text: str | None, *, has_data: bool) -> str | None:
    """Return the message of an error without values; None if it consists of them.

    `has_data` is true of a `UserError`, whose message is part of its data, and of the failure of a child with one.
    """
    if text is None:
        return None
    if has_data or name == "UserError":
        child = re.match(r"Child task [0-9a-f-]{36} failed: [\w.]+(?=:|$)", text) if name == "ChildFailed" else None
        return child[0] if child else None
    return without_values(text)


def without_values(text: str) -> str:
    """Cut SQL parameters and rejected input out of a message."""
    # The failure of a child contains its message; that of a UserError is data.
    text = _DATA_OF_CHILD.sub(rf"\1: {CUT}", text)
    # Literals of a statement may be values.
    text = _STATEMENT.sub(lambda found: _LITERAL.sub(f"'{CUT}'", found[0]), text)
    for pattern, replacement in _PARTS:
        text = re.sub(pattern, replacement, text)
    return text


def traceback_of(text: str | None, error: str) -> str | None:
    """Return a traceback with the classes of its exceptions, but of their messages only that in `error`, of the last.

    `error` is the class and the message of the last exception. A frame is kept with its line of code, which is no
    value; nothing is kept of any other text.
    """
    if text is None:
        return None
    lines = list(_frames_and_classes(text))
    name = error.partition(":")[0].partition(" ")[0]
    for index in range(len(lines) - 1, -1, -1):
        before, found, after = lines[index].rpartition(name)
        if found and not after:
            lines[index] = f"{before}{error}"
            break
    return "\n".join(lines)


def _frames_and_classes(text: str) -> Iterator[str]:
    code_indent: str | None = None
    """The least indentation of the code of the frame above; None if the next text is no code."""
    expects_class = False
    for line in text.splitlines():
        margin = _MARGIN.match(line)
        prefix = margin[0] if margin else ""
        rest = line[len(prefix) :]
        if (frame := _FRAME.match(rest)) and frame["indent"]:
            # Code that has no file was made from a value.
            code_indent = None if frame["file"].startswith("<") else frame["indent"] + "  "
            expects_class = True
            yield line
        elif _MARKER.match(rest.strip()):
            code_indent, expects_class = None, True
            yield line
        elif (code_indent is not None and rest.startswith(code_indent)) or _REPEATED.match(rest):
            yield line
        else:
            code_indent = None
            if expects_class and (found := _CLASS.match(rest.strip())):
                yield f"{prefix}{found[0]}"
                expects_class = False
