"""Run the benchmarks: python -m benchmarks [flow|depth|deep|spectrum|monitor|search ...] [--quick] [--device cpu|cuda] [--threads N] [--only PATTERN] [--save]

All of them by default. Progress goes to standard error, the report to standard output.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator

import torch

from benchmarks import deep, depth, flow, monitor, search, spectrum
from benchmarks.report import machine, save
from benchmarks.workloads import Setting

BENCHMARKS: dict[str, Callable[[Setting], Iterator[str]]] = {
    "flow": flow.run,
    "depth": depth.run,
    "deep": deep.run,
    "spectrum": spectrum.run,
    "monitor": monitor.run,
    "search": search.run,
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", choices=[*BENCHMARKS, []], metavar="NAME", help=", ".join(BENCHMARKS)
    )
    parser.add_argument("--quick", action="store_true", help="small models, few repetitions: does it run?")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch on the CPU")
    parser.add_argument(
        "--only", default="", help="of flow and monitor: the models whose description matches"
    )
    parser.add_argument("--save", action="store_true", help="keep the report in benchmarks/results")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    setting = Setting(chosen.quick, chosen.device, chosen.threads, chosen.only)
    command = shlex.join(["python", "-m", "benchmarks", *arguments])
    for name in chosen.names or BENCHMARKS:
        parts = [f"# {name}\n\n{machine(setting)}\n\n    {command}"]
        print(parts[0], flush=True)
        for part in BENCHMARKS[name](setting):
            print(f"\n{part}", flush=True)
            parts.append(part)
        if chosen.save:
            save(name, setting, "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
