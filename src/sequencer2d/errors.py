"""What the errors of other libraries say, in one line."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none.

    Example: `first_line(ValueError("no route\\nmore")) == "no route"`
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]
