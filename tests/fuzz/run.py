"""Coverage-guided fuzzing of everything that reads a GGUF file. Needs atheris, which is no dependency of the tests:

    pip install atheris
    python tests/fuzz/run.py FOLDER tests/fuzz/corpus -runs=1000000 -max_len=4096

With `--footprints` in front, every model's compute graph is drawn as well, ten times slower. FOLDER collects inputs;
the kept corpus is `-merge=1` of it. An input that takes over a second or raises the process's memory by more than
64 MiB is a finding, as is every error that is not ours.
"""

from __future__ import annotations

import resource
import sys

import atheris

with atheris.instrument_imports(include=["scheduler"]):
    from target import Target

    from scheduler.costs import header

MOST_GROWTH_KIB = 64 << 10


def main() -> None:
    header.MAX_STRINGS = 4096  # millions of empty strings take a third of a second, in which thousands of inputs fit
    footprints = "--footprints" in sys.argv
    arguments = [argument for argument in sys.argv if argument != "--footprints"]
    target = Target(footprints=footprints)
    target.run(b"\1\0")  # what is remembered for good is not growth

    def one_input(data: bytes) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        target.run(data)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if grown > MOST_GROWTH_KIB:
            raise MemoryError(f"one input took {grown >> 10} MiB")

    atheris.Setup([*arguments, "-timeout=1", "-rss_limit_mb=4096"], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
