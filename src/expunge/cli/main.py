"""The command line: thin, no logic of its own. Errors meant for the user are one sentence and an exit code."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import traceback
from typing import Annotated

import typer

from expunge.cli import commands
from expunge.cli.output import Output
from expunge.core.errors import ExpungeError, OwnCodeError
from expunge.core.version import __version__

app = typer.Typer(
    name="expunge",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"expunge {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Expunge makes a trained model forget, and proves it.

    \b
    A first look (about five minutes, no download):
      expunge demo
    On your own model and data:
      expunge unlearn MODEL --forget forget.jsonl --retain retain.jsonl --out runs/first
      expunge audit runs/first --retrain 3 --base BASE
      expunge report runs/first

    \b
    Memory: the model, its gradients and AdamW's two moments (16 bytes a parameter in float32). Most methods read only
    log-probabilities of the frozen target, which are computed once and cached: no second copy. Methods that read its
    full logits or features at each step (retain=kl, undial, rmu) hold a second copy, unless parameters=lora: then the
    target is the model with the adapter switched off.

    \b
    Exit codes: 0 done, goal reached; 2 bad input, nothing started; 3 finished, goal not reached; 4 stopped to
    protect the model; 130 interrupted (--resume goes on).
    """


for _info in pkgutil.iter_modules(commands.__path__):
    importlib.import_module(f"expunge.cli.commands.{_info.name}").register(app)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns (and, as a script, exits with) the exit code."""
    words = sys.argv[1:] if argv is None else argv
    output = Output(machine="--json" in words)
    try:
        command = typer.main.get_command(app)
        result = command.main(args=words, prog_name="expunge", standalone_mode=False)
        code = result if isinstance(result, int) else 0
        if code == 130:  # typer turns Ctrl-C into this without a word
            code = _interrupted(output, words)
    except ExpungeError as error:
        if isinstance(error, OwnCodeError):
            sys.stderr.write(error.trace)
        output.error(error.message, error.remedy)
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = _interrupted(output, words)
    except typer.Exit as error:
        code = error.exit_code
    except BrokenPipeError:  # the reader of the output went away (`expunge methods | head`)
        sys.stderr.close()
        code = 141
    except Exception as error:
        code = output.unforeseen(error, traceback.format_exc())
    if argv is None:
        sys.exit(code)
    return code


def _interrupted(output: Output, words: list[str]) -> int:
    how = " with --resume" if words[:1] in (["train"], ["unlearn"], ["sweep"], ["benchmark"]) else ""
    output.error("Interrupted.", f"The same command{how} goes on where it stopped.")
    return 130


if __name__ == "__main__":
    main()
