"""How long the toolkit takes to start: `import kuosan` beside `import torch`, and `kuosan --help`.

    python benchmarks/start_up.py

Each command runs 7 times, alternating; the medians and their ratio are printed.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = {
    "import torch": [sys.executable, "-c", "import torch"],
    "import kuosan": [sys.executable, "-c", "import kuosan"],
    "import kuosan, all of the core": [
        sys.executable,
        "-c",
        "import kuosan as ks; ks.Denoiser, ks.DiffusionChain, ks.sample",
    ],
    "kuosan --help": [str(Path(sys.executable).with_name("kuosan")), "--help"],
}


def seconds(command: list[str]) -> float:
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(7):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    reference = statistics.median(times["import torch"])
    print(f"{'command':34s}{'median':>10s}{'over import torch':>20s}")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:34s}{median:>8.3f} s{median / reference:>20.2f}")


if __name__ == "__main__":
    main()
