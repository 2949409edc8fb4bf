"""`make bench [ARGS="path stop …"]`: run benchmarks and write docs/benchmarks.md."""

import asyncio
import importlib
import sys

BENCHMARKS = {
    "path": "path",
    "routing": "routing",
    "start": "start",
    "page": "ui_streams",
    "convert": "convert",
    "durability": "durability",
    "durability-scripted": "durability_scripted",
    "stop": "stopping",
    "overload": "overload",
    "slow": "slow_readers",
    "blackhole": "black_hole",
    "continuation": "continuation",
    "recovery": "recovery",
}


def main() -> None:
    """Run the named benchmarks, or all."""
    for name in sys.argv[1:] or BENCHMARKS:
        if name not in BENCHMARKS:
            sys.exit(f"Unknown benchmark {name!r}; known: {', '.join(BENCHMARKS)}")
        asyncio.run(importlib.import_module(f"tests.bench.{BENCHMARKS[name]}").main())


if __name__ == "__main__":
    main()
