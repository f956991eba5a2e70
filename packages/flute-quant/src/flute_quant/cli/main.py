"""Arguments, exit codes, and errors as one sentence each."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from flute_kernels import FluteError
from flute_quant.cli import compare, evaluate, importing, inspect, quantize
from flute_quant.version import package_version

__all__ = ["main"]

_CUT_OFF = 1
_REFUSED = 2
_INTERRUPTED = 130  # 128 + SIGINT, as shells count


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 where nobody reads on, 2 for a refusal, 130 for an interruption."""
    parser = argparse.ArgumentParser(
        prog="flute-quant", description="Quantize language-model checkpoints to lookup-table weights."
    )
    parser.add_argument("--version", action="version", version=f"flute-quant {package_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (quantize, importing, inspect, compare, evaluate):
        module.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        status = int(options.run(options))
        sys.stdout.flush()  # here, where a reader that is gone is caught; not when Python exits
        return status
    except FluteError as error:
        print(f"flute-quant: {error}", file=sys.stderr)
    except BrokenPipeError:
        # The reader (head, a pager) has seen enough: no message, and rich's exit code for it. What
        # Python would still flush at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CUT_OFF
    except OSError as error:
        # Where no code of ours had more to say, the system's reason and the file are the sentence.
        print(f"flute-quant: {error.filename or 'a file'}: {error.strerror or error}.", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"flute-quant: {options.interrupted(options)}", file=sys.stderr)
        return _INTERRUPTED
    return _REFUSED
