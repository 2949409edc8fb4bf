"""What the log costs where the engine costs nothing: `tests.bench.durability` on the scripted engine."""

from tests.bench.durability import measure

STREAMS = {1: 8, 16: 48, 64: 128}


async def main() -> None:
    """Run it and write the section `durability-scripted`."""
    await measure("durability-scripted", "scripted", STREAMS)
