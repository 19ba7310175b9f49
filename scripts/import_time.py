"""What `import ordnung` adds to importing torch and transformers: `python scripts/import_time.py [runs]`."""

import statistics
import subprocess
import sys

PROGRAM = """
import time
import torch, transformers
start = time.perf_counter()
import ordnung
print(time.perf_counter() - start)
"""


def import_seconds(runs):
    """Seconds that `import ordnung` took in each of `runs` fresh processes, after torch and transformers."""
    return [float(subprocess.check_output([sys.executable, "-c", PROGRAM])) for _ in range(runs)]


def main(argv=None):
    arguments = sys.argv[1:] if argv is None else argv
    times = import_seconds(int(arguments[0]) if arguments else 5)
    print(f"import ordnung: median {statistics.median(times):.3f} s, {min(times):.3f} to {max(times):.3f} s")


if __name__ == "__main__":
    main()
