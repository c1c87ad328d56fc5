"""The command `lvlm`: finds the command that is asked for, and turns what goes wrong into one line and an exit code.

Commands are named by where they live and are imported when they run, so that `lvlm --help` imports none of them.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Final

from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError

from studies.output import flush, prepare_streams, version

HELP: Final = """What serving a large vision-language model costs: tokens, time, memory, energy and money.

Results go to stdout, everything else to stderr. Exit codes: 0 fine, 1 failure while running, 2 bad usage or bad
input, 3 nothing feasible (the model does not fit).

Try: lvlm predict qwen2.5-vl-7b h100-sxm5-80gb --image 1920x1080 --text 64 --output 128
"""
COMMANDS: Final = {
    "models": "List the known models, or show one with its numbers and where they come from.",
    "hardware": "List the known devices, or show one with the source of every number.",
    "engines": "List the serving engines, or show one with the source of every number.",
    "techniques": "List the published methods, or show one with its defaults, quality and measurements.",
    "tokens": "Count the patches and tokens that pictures become.",
    "count": "Count parameters, FLOPs by stage and KV bytes of a request.",
    "predict": "Predict TTFT, TPOT, memory, energy and cost of a request, and say why.",
    "compose": "Compare each technique alone with all together: what adds up, what cancels, where the bottleneck went.",
    "solve": "Find what meets a target, or from where on a technique pays.",
    "roofline": "Show every stage and operator under the roofs of the device.",
    "simulate": "Simulate serving: latencies, promises kept, goodput, use of the hardware, money and energy.",
    "workloads": "List the workloads and the trace formats, with their sources.",
    "calibrate": "Fit the efficiency curves of a device to measured kernels, with the error on held-out shapes.",
    "validate": "Compare predictions with published and measured data.",
    "measure": "Measure a model on a real device: stages, kernels, and transformers beside them.",
    "compare": "Put measurements beside their predictions: signed errors, medians, and how many lie in the band.",
    "trace": "List the operators of a model that is not modelled, from its transformers implementation.",
}
"""Commands by name, with their summaries; each is the function `<name>.<name>` in `studies.commands`."""


class Exit(IntEnum):
    """Exit codes."""

    FINE = 0
    FAILED = 1
    BAD_INPUT = 2
    INFEASIBLE = 3
    INTERRUPTED = 130


def build_app() -> App:
    """Return the application with every command registered by name."""
    app = App(
        name="lvlm",
        help=HELP,
        version=version,
        default_parameter=Parameter(negative=()),
        result_action="return_value",
        print_error=False,
        exit_on_error=False,
        suppress_keyboard_interrupt=False,
    )
    for position, (name, summary) in enumerate(COMMANDS.items()):
        app.command(f"studies.commands.{name}:{name}", name=name, help=summary, sort_key=position)
    app.register_install_completion_command()
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `lvlm` and return its exit code.

    Parameters
    ----------
    arguments : sequence of str, optional
        What follows the command's name; by default that of the process.
    """
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    prepare_streams()
    return _guarded(lambda: _run(tokens))


def _run(tokens: list[str]) -> int:
    code = build_app()(tokens)
    flush()
    return code if isinstance(code, int) else Exit.FINE


def _guarded(run: Callable[[], int]) -> int:
    """Run, and turn what goes wrong into one line on stderr and an exit code."""
    try:
        return run()
    except BrokenPipeError:  # the reader has seen enough
        flush()
        return Exit.FINE
    except SystemExit as stop:  # Rich at a closed pipe; --install-completion, when it knows no shell
        return Exit.FAILED if stop.code and not isinstance(stop.__context__, BrokenPipeError) else Exit.FINE
    except KeyboardInterrupt:
        return _fail(Exit.INTERRUPTED, "interrupted")
    except Exception as error:  # noqa: BLE001 - a line and an exit code instead of a traceback
        return _fail(*_verdict(error), error)


def _verdict(error: Exception) -> tuple[Exit, str]:
    """Return the exit code of an error, and what to say."""
    if isinstance(error, CycloptsError):
        return Exit.BAD_INPUT, _usage(error)
    from costmodel import DoesNotFit

    if isinstance(error, DoesNotFit):
        return Exit.INFEASIBLE, str(error)
    slips = (KeyError, IndexError, UnicodeEncodeError)  # kinds of LookupError and ValueError that no input should cause
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
    foreseen = isinstance(error, LookupError | ValueError | OSError | ModuleNotFoundError)
    if foreseen and not full and not isinstance(error, slips):
        return Exit.BAD_INPUT, str(error) or type(error).__name__
    return Exit.FAILED, f"failed with {type(error).__name__}: {error} (LVLM_DEBUG=1 shows where)"


def _usage(error: CycloptsError) -> str:
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        return f"unexpected argument {error.unused_tokens[0]!r}; see lvlm {' '.join(error.command_chain or ())} --help"
    text = str(error)
    return text[:1].lower() + text[1:]


def _fail(code: Exit, message: str, error: Exception | None = None) -> int:
    """Print a message as one line on stderr, with its traceback if the environment asks for it."""
    flush()
    if error is not None and os.environ.get("LVLM_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    line = " ".join(message.split())
    print(f"lvlm: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
