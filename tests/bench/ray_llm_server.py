"""The peer `ray.serve.llm` with one CPU replica. Run by the interpreter of its own environment, not by ours.

Arguments: the model's folder, the port, tokens of context. Environment: its direct streaming is chosen by variables of
Ray, which `tests.bench.ray_llm` sets.
"""

import os
import sys

import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app


def main() -> None:
    """Serve until killed."""
    model, port, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    config = LLMConfig(
        model_loading_config={"model_id": "peer", "model_source": model},
        deployment_config={"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}},
        placement_group_config={"bundle_per_worker": {"CPU": 1}},
        engine_kwargs={"max_model_len": context, "enforce_eager": True, "dtype": "bfloat16", "max_num_seqs": 64},
        runtime_env={"env_vars": {name: os.environ[name] for name in os.environ if name.startswith(("VLLM_", "OMP_"))}},
    )
    # Its parts ask for a core each, more than a small machine has; they are counted, not bound.
    ray.init(address="local", num_cpus=8, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build_openai_app({"llm_configs": [config]}), blocking=True)


if __name__ == "__main__":
    main()
