"""What the errors of other libraries say, in one line."""

LONGEST = 500
"""Characters of a message that are shown; PyTorch's name every parameter that does not fit."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something, or the error's kind where it has no message.

    Example: `first_line(ValueError("no route\\nmore")) == "no route"`
    """
    if type(error) is KeyError:
        return f"there is no {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
