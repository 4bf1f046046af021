"""The command line, `pkm-perf`."""

import argparse
import importlib
import sys

_COMMANDS = {
    "sweep": ("sweep.command", "measure a grid of points, and plot it (the main job)"),
    "check": ("check.command", "prove the library on this machine, with torch and triton alone"),
    "op": ("op.command", "time one op, side by side with another checkout"),
    "plot": ("report.plot", "make the tables and pictures again from a CSV"),
    "compare": ("report.compare", "ratios of the medians of two CSVs"),
    "study": ("studies.command", "repeat a study of the paper: train, time, tables and figures"),
    "train": ("studies.train_command", "train one language model with memories, and save it"),
    "kernels": (
        "compiled.kernel_report",
        "compile the kernels for GPUs and report their resources",
    ),
}
"""Name, module and help. A module has `add_arguments(parser)` and `run(arguments) -> int`, and is
imported only when its command is called."""


_EXTRAS = {"matplotlib": "perf", "psutil": "perf", "tqdm": "perf", "tokenizers": "studies"}
"""What a module that is missing is installed with, where not by its own name."""


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 2 for a user's mistake, 1 for an error of the file system and 130 for
        Ctrl-C, each told in one line on stderr.
    """
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="pkm-perf", description="Measure product-key memory, and show what was measured."
    )
    commands = parser.add_subparsers(metavar="command")
    try:
        for name, (module_name, text) in _COMMANDS.items():
            command = commands.add_parser(name, help=text)
            if words[:1] == [name]:
                module = importlib.import_module(f".{module_name}", __package__)
                command.description = module.__doc__
                command.formatter_class = argparse.RawDescriptionHelpFormatter
                module.add_arguments(command)
                command.set_defaults(run=module.run)
        if not words:
            parser.print_help(sys.stderr)
            return 2
        arguments = parser.parse_args(words)
        return arguments.run(arguments)
    except ValueError as error:
        return _complain(str(error), 2)
    except OSError as error:
        return _complain(str(error), 1)
    except KeyboardInterrupt:
        return _complain("stopped", 130)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(__package__ or "pkm_triton"):
            raise
        package = error.name.partition(".")[0]
        wanted = f"'pkm-triton[{_EXTRAS[package]}]'" if package in _EXTRAS else package
        return _complain(f"{error}; install it with: pip install {wanted}", 2)


def _complain(text: str, status: int) -> int:
    print(f"pkm-perf: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
