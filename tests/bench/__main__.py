"""`make bench [ARGS="path stop …"]`: run benchmarks and write docs/benchmarks.md."""

import asyncio
import importlib
import sys

BENCHMARKS = {
    "path": "path",
    "ray-llm": "ray_llm",
    "gateway-cpu": "gateway_cpu",
    "gateway-profile": "gateway_profile",
    "decoding": "decoding",
    "drafters": "drafters",
    "prefill": "prefill",
    "quantised": "quantised",
    "routing": "routing",
    "decisions": "decisions",
    "closed-choice": "closed_choice",
    "start": "start",
    "page": "ui_streams",
    "convert": "convert",
    "durability": "durability",
    "durability-scripted": "durability_scripted",
    "stop": "stopping",
    "overload": "overload",
    "admission": "admission",
    "unary": "unary",
    "slow": "slow_readers",
    "blackhole": "black_hole",
    "continuation": "continuation",
    "recovery": "recovery",
    "metrics": "metrics",
    "store-load": "store_load",
    "fleet-idle": "fleet_idle",
    "affinity": "affinity",
    "scaling": "scaling",
}
LONG = {"soak": "soak"}  # run by name only


def main() -> None:
    """Run the named benchmarks, or all that take minutes."""
    known = BENCHMARKS | LONG
    for name in sys.argv[1:] or BENCHMARKS:
        if name not in known:
            sys.exit(f"Unknown benchmark {name!r}; known: {', '.join(known)}")
        asyncio.run(importlib.import_module(f"tests.bench.{known[name]}").main())


if __name__ == "__main__":
    main()
