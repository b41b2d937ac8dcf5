"""`jaxinv COMMAND ...`: the same commands as `python -m jaxinv.COMMAND`."""

import importlib
import importlib.util
import sys

COMMANDS = {
    "sweep": "run a study and report it",
    "study": "run or resume many sweeps, and show them on one page",
    "train": "train a network to attack, and keep its checkpoints",
    "search": "try hundreds of settings of one attack at once",
    "invert": "attack one update of a trained network, from a file",
    "audit": "how much one update gives away, at least and at most",
    "report": "rebuild a run's tables, plots and page",
    "prepare": "download and prepare CIFAR-10 or CIFAR-100",
}


def main() -> int:
    """Hands the arguments to the command named first; returns its exit code."""
    if len(sys.argv) > 1 and sys.argv[1] in COMMANDS:
        name = f"jaxinv.{sys.argv[1]}"
        name += ".__main__" if importlib.util.find_spec(f"{name}.__main__") else ""
        return importlib.import_module(name).main(sys.argv[2:])
    lines = [f"  {name:8} {what}" for name, what in COMMANDS.items()]
    print("usage: jaxinv COMMAND ... (COMMAND --help for its settings)", *lines, sep="\n")
    return 0 if set(sys.argv[1:]) & {"-h", "--help"} else 2


if __name__ == "__main__":
    sys.exit(main())
