"""What vLLM is started with: its engine arguments and the environment that it and its libraries read at import.

Plain values, so that this module needs no vLLM; `serving.vllm_engine` makes the engine of them.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from onebox.settings import Settings
from serving.adapters import Adapter
from serving.models import ResolvedModel

GIB = 1024**3
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
BATCHED_TOKENS = 2048  # vLLM's own default


def prepare_environment(settings: Settings, model: ResolvedModel) -> None:
    """Set the variables of this process for an engine; vLLM's core process inherits them."""
    threads = settings.cpu_threads or max(1, (os.cpu_count() or 1) // settings.replica_bounds[1])
    os.environ |= {
        # Replicas share the cores; vLLM's own binding would give each of them the same ones.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # Ray sets 1 for an actor of one CPU.
        "OMP_NUM_THREADS": str(threads),
        # Threads spin briefly at their barriers, then sleep. On an idle machine (2 cores, smollm2-135m; 1, 8, 16)
        # streams, 20,000 turns give 44, 300, 482 tok/s, as does the default of 300,000; 1,000 turns 34, 252, 417, and
        # OMP_WAIT_POLICY=PASSIVE 28, 220, 378. Long spinning starves the other processes of a busy machine.
        "GOMP_SPINCOUNT": "20000",
        # A fork of a process with Ray's and torch's threads may deadlock.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_LOGGING_LEVEL": settings.log_level.upper(),
        "VLLM_NO_USAGE_STATS": "1",
        # vLLM would send its traces by gRPC.
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_SERVICE_NAME": "onebox-engine",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if Path(model.path).is_dir():
        os.environ["HF_HUB_OFFLINE"] = "1"


def engine_arguments(
    settings: Settings, model: ResolvedModel, adapters: Mapping[str, Adapter], *, on_cpu: bool
) -> dict[str, object]:
    """The arguments of `AsyncEngineArgs`."""
    return {
        "model": model.path,
        "served_model_name": model.alias,
        "max_model_len": model.context_length,
        "max_num_seqs": settings.engine_max_ongoing,
        "enable_prefix_caching": settings.prefix_caching,
        "scheduling_policy": "priority",
        "enable_log_requests": False,
        "otlp_traces_endpoint": settings.otel_endpoint,
        **(_on_cpu(settings) if on_cpu else _on_gpu(settings)),
        **(_speculation(settings) if speculates(settings, model, on_cpu=on_cpu) else {}),
        **(_lora(settings, adapters) if adapters else {}),
    }


def speculates(settings: Settings, model: ResolvedModel, *, on_cpu: bool) -> bool:
    """Whether tokens are drafted. Not for models that draw with `min_p`: vLLM refuses their requests then."""
    if settings.speculation == "off" or (settings.speculation == "auto" and not on_cpu):
        return False
    try:
        defaults = json.loads((Path(model.path) / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    return not defaults.get("min_p")


def _on_cpu(settings: Settings) -> dict[str, object]:
    return {
        "dtype": "bfloat16" if settings.model_dtype == "auto" else settings.model_dtype,
        # Compiling took 197 s at start and changed greedy answers; eager 30 s and none.
        "enforce_eager": True,
        "kv_cache_memory_bytes": int(settings.cpu_kv_cache_gib * GIB),
        # Only whole blocks are cached, and vLLM's 128 are many of a short prompt. Attention takes 2-6 % longer with 32,
        # which is 0.1 % of a step.
        "block_size": 32,
    }


def _on_gpu(settings: Settings) -> dict[str, object]:
    return {
        "dtype": settings.model_dtype,
        "gpu_memory_utilization": settings.gpu_memory_fraction,
        "tensor_parallel_size": settings.tensor_parallel,
        "pipeline_parallel_size": settings.pipeline_parallel,
        # The replica's placement group has a bundle per GPU; Ray's executor puts a worker in each.
        "distributed_executor_backend": "ray" if settings.tensor_parallel * settings.pipeline_parallel > 1 else None,
    }


def _speculation(settings: Settings) -> dict[str, object]:
    tokens = settings.speculation_tokens
    config = {
        "method": "custom_class",
        "model": "serving.vllm_core.CoreDrafter",
        "num_speculative_tokens": tokens,
        # The same at every batch size; without a schedule vLLM pads some first steps with drafts of token -1.
        "num_speculative_tokens_per_batch_size": [(1, settings.engine_max_ongoing, tokens)],
    }
    return {"speculative_config": config}


def _lora(settings: Settings, adapters: Mapping[str, Adapter]) -> dict[str, object]:
    rank = max(adapter.rank for adapter in adapters.values())
    modules = {module for adapter in adapters.values() for module in adapter.modules}
    return {
        "enable_lora": True,
        # One place more than adapters: on CPU, vLLM 0.32 gives requests without an adapter the last place's weights
        # when others in their batch have one, so it must stay empty.
        "max_loras": len(adapters) + 1,
        "max_lora_rank": next(allowed for allowed in LORA_RANKS if allowed >= rank),
        "lora_target_modules": None if "all-linear" in modules else sorted(modules),
        # vLLM wants room for a draft of full length for every request.
        "max_num_batched_tokens": max(BATCHED_TOKENS, settings.engine_max_ongoing * (settings.speculation_tokens + 1)),
    }
