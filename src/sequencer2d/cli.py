"""The command line: a table of verbs, each a view of a function. Imports happen inside the verb."""

import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper

from sequencer2d import __version__

VERBS = {
    "train": "train a model; without options: the embedded digits, in about a minute",
    "evaluate": "accuracy, calibration and confusions of a model on a data set",
    "predict": "classify images, folders, or an image on standard input",
    "prepare": "fetch, verify and lay out a data set; safe to interrupt and repeat",
    "check": "unreadable, duplicate and leaking images of a folder, classes and sizes",
    "models": "list the variants with their parameters and sizes",
    "benchmark": "speed and memory against timm, ONNX Runtime and OpenVINO, in turn on this CPU",
}

DONE, PROBLEM, WRONG_INPUT, STOPPED = 0, 1, 2, 75
"""Exit status: done; the work found a problem; wrong usage or input; stopped by request and resumable."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb and returns its exit status. Wrong input is one line on standard error, without a traceback."""
    if isinstance(sys.stdout, TextIOWrapper):  # a file name that a console cannot show is no reason to stop
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        print(_usage())
        return DONE if arguments else WRONG_INPUT
    if verb == "--version":
        print(f"sequencer2d {__version__}")
        return DONE
    if verb not in VERBS:
        import difflib

        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}"
        return _complain(f"no verb {verb!r}: {hint}")
    try:
        from sequencer2d import verbs

        run: Callable[[list[str]], int] = getattr(verbs, verb)
        return run(arguments[1:])
    except KeyboardInterrupt:
        return _complain("interrupted", status=130)
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        sys.stderr.close()
        return DONE
    except (ValueError, OSError, MemoryError, ImportError) as error:
        return _complain(str(error) or type(error).__name__)
    except RuntimeError as error:
        return _complain(str(error), status=PROBLEM)


def _usage() -> str:
    rows = "\n".join(f"  {verb:<10} {what}" for verb, what in VERBS.items())
    return (
        "usage: sequencer2d VERB [options]\n\n"
        "Deep LSTMs for image classification (Sequencer, NeurIPS 2022).\n\n"
        f"{rows}\n\n"
        "sequencer2d VERB --help lists the options of a verb; sequencer2d --version its version."
    )


def _complain(message: str, status: int = WRONG_INPUT) -> int:
    print(f"sequencer2d: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
