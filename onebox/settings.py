"""Every setting of every process, read once from `ONEBOX_*` variables into one frozen object.

The command `python -m deploy settings` prints this table for the docs.
"""

import difflib
import os
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from onebox.errors import SetupError
from onebox.labels import Learning

PREFIX = "ONEBOX_"
# The launcher's mark on its processes, and the folder of models that tests share.
NOT_SETTINGS = frozenset({"instance", "test_home"})


class Settings(BaseSettings):
    """The settings; the defaults run on a laptop without a GPU."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    home: Path = Field(Path("~/.onebox"), description="Folder of models, store and logs.")
    host: str = Field("127.0.0.1", description="Address the API and the page listen on.")
    insecure_bind: bool = Field(False, description="Allow a non-loopback `host` without TLS in front.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe level logged.")
    log_format: Literal["text", "json"] = Field("text", description="Log lines for people, or one JSON object each.")
    otel_endpoint: str | None = Field(
        None, description="Where traces go, over OTLP/HTTP, e.g. `http://collector:4318/v1/traces`; unset: nowhere."
    )

    admin_key: SecretStr | None = Field(
        None, description="Admin API key; unset: one is made at the first start and printed once."
    )
    ui_key: SecretStr | None = Field(None, description="API key of the page; the launcher makes one per start.")
    internal_token: SecretStr | None = Field(
        None, description="Bearer token between gateway and engines; the launcher makes one per start."
    )

    api_port: int = Field(8080, ge=0, le=65535, description="Port of the HTTP API.")
    ui_port: int = Field(7860, ge=0, le=65535, description="Port of the page.")
    gateway_workers: int = Field(2, ge=1, le=64, description="Gateway processes.")
    api_url: str | None = Field(None, description="Where the page finds the API; unset: `host` and `api_port`.")

    redis_url: str | None = Field(None, description="A Redis to use; unset: the launcher starts a Valkey under `home`.")
    redis_timeout_s: float = Field(0.5, gt=0, description="Time for one Redis operation, retried once.")

    engine: Literal["vllm", "scripted"] = Field(
        "vllm", description="What generates; `scripted` is for load tests only."
    )
    engine_url: str = Field("http://127.0.0.1:8100", description="Where the gateway finds the engine fleet.")
    engine_port: int = Field(8100, ge=0, le=65535, description="Port of the Ray Serve ingress.")
    engine_replicas: int = Field(1, ge=1, le=10_000, description="Engine replicas at the start.")
    engine_replicas_min: int | None = Field(
        None, ge=0, le=10_000, description="Fewest replicas; 0: none while idle. Unset: as many as at the start."
    )
    engine_replicas_max: int | None = Field(
        None, ge=1, le=10_000, description="Most replicas. Unset: as many as at the start."
    )
    engine_scale_up_s: float = Field(2.0, ge=0, description="Time too few replicas are endured before more start.")
    engine_scale_down_s: float = Field(30.0, ge=0, description="Time too many replicas are kept before some leave.")
    engine_idle_s: float = Field(
        300.0, ge=0, description="Idle time after which the last replica leaves, where `engine_replicas_min` is 0."
    )
    engine_replicas_per_node: int | None = Field(
        None, ge=1, description="Most replicas of a model on one machine of a cluster; unset: as many as fit."
    )
    engine_ingress: Literal["haproxy", "proxy"] = Field("haproxy", description="Ray Serve ingress mode.")
    engine_doors: bool = Field(
        True, description="Send requests straight to the replica that suits; off: the ingress chooses for all of them."
    )
    engine_max_ongoing: int = Field(64, ge=1, description="Requests one replica works on at a time.")
    engine_max_queued: int = Field(256, ge=0, description="Requests that may wait at one replica; beyond: 429.")
    engine_door_ports: str | None = Field(
        None,
        pattern=r"^\d{1,5}-\d{1,5}$",
        description="Ports of the replicas' own doors, first-last, so that a firewall can name them; unset: any free.",
    )
    engine_coalesce_ms: float = Field(
        15.0, ge=0, description="Frames of one reply are merged for this long, but for the first."
    )
    engine_frames_per_s: float = Field(
        2500.0,
        gt=0,
        description="Frames that a replica sends for all its replies: the more there are, the longer each one's frames "
        "are merged, 100 ms at most. A frame costs its gateway about 80 µs of CPU, whatever is in it.",
    )

    fleet_file: Path | None = Field(
        None, description="TOML file of several models, adapters and the tasks they serve; unset: one model."
    )
    model: str = Field("auto", description="Alias of the catalogue, a local path or a hub id; `auto` picks by machine.")
    model_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Weights' type; auto is bfloat16."
    )
    model_quantization: Literal["none", "int8"] = Field(
        "none", description="Round the weights: faster on CPU, replies a little different; see docs/decoding.md."
    )
    model_context: int | None = Field(
        None, ge=256, description="Tokens of context; unset: the model's own, at most 8192 on CPU."
    )
    tensor_parallel: int = Field(1, ge=1, description="GPUs that share each layer of the model.")
    pipeline_parallel: int = Field(
        1, ge=1, description="Groups of such GPUs that the layers are divided among; also over several machines."
    )
    gpu_memory_fraction: float = Field(0.9, gt=0, le=1, description="Share of a GPU's memory the engine takes.")
    cpu_kv_cache_gib: float = Field(1.0, gt=0, description="KV cache on CPU, GiB.")
    cpu_threads: int | None = Field(
        None, ge=1, description="Threads per CPU replica; unset: cores shared among replicas."
    )
    adapters: dict[str, str] = Field(
        {}, description="LoRA adapters that can be asked for as models: name to folder (JSON object)."
    )
    prefix_caching: bool = Field(True, description="Keep the KV blocks of common prefixes.")
    speculation: Literal["auto", "on", "off"] = Field(
        "auto", description="Draft tokens from the text itself and check several in one step; `auto`: on CPU."
    )
    speculation_tokens: int = Field(16, ge=1, le=64, description="Most tokens drafted for one request in one step.")
    ray_metrics: bool = Field(False, description="Send vLLM's metrics to Ray's own metrics port too.")

    scripted_ttft_ms: float = Field(20.0, ge=0, description="Scripted engine: time to the first token.")
    scripted_itl_ms: float = Field(5.0, ge=0, description="Scripted engine: time between tokens.")
    scripted_prefill_us: float = Field(
        0.0, ge=0, description="Scripted engine: time for each prompt token that its prefix cache has not, µs."
    )
    scripted_cache_tokens: int = Field(
        0, ge=0, description="Scripted engine: tokens that its simulated prefix cache holds; 0: it has none."
    )

    body_max_bytes: int = Field(1024 * 1024, ge=1024, description="Largest JSON body.")
    messages_max: int = Field(512, ge=1, description="Most messages in a request.")
    max_tokens_default: int = Field(2048, ge=1, description="Reply length where none is asked for.")
    max_tokens_cap: int = Field(8192, ge=1, description="Longest reply that can be asked for.")
    connect_timeout_s: float = Field(2.0, gt=0, description="Time to connect to an engine.")
    first_token_timeout_s: float = Field(60.0, gt=0, description="Time to an engine's first frame.")
    stall_timeout_s: float = Field(30.0, gt=0, description="Longest silence of an engine in a reply.")
    queue_per_place: float = Field(
        4.0, ge=0, description="Runs that may wait in the gateway for each place of the engines; beyond: 429."
    )
    tenant_max_running: int = Field(0, ge=0, description="Places one tenant may have at a time; 0: any number.")
    tenant_max_queued: int = Field(
        0, ge=0, description="Runs of one tenant that may wait; beyond: 429; 0: as many as fit into the queue."
    )
    share_interval_s: float = Field(
        0.5, gt=0, description="Time after which gateway workers tell each other how much of the engines they use."
    )
    run_timeout_s: float = Field(600.0, gt=0, description="Longest run.")
    engine_continuations: int = Field(
        3, ge=0, description="Times one engine call may go on at another replica after its own was lost."
    )
    engine_patience_s: float = Field(
        20.0, gt=0, description="How long a reply that has begun waits for a replica to go on at."
    )
    engine_probe_after_s: float = Field(
        0.5, gt=0, description="Silence in a reply after which its replica is asked whether it lives."
    )
    engine_probe_timeout_s: float = Field(1.0, gt=0, description="Time for that answer; none: go on elsewhere.")
    lease_s: float = Field(10.0, gt=0, description="A run whose worker is silent for this long goes to another.")
    lease_renew_s: float = Field(3.0, gt=0, description="Time between two renewals of a lease.")
    log_interval_ms: float = Field(30.0, ge=0, le=30, description="Events of a run are stored together for this long.")
    log_keep_s: int = Field(
        86_400, ge=60, description="Run logs and idempotency keys are kept this long after the end."
    )
    log_enabled: bool = Field(True, description="Store runs before they are sent; off only to measure what it costs.")
    store_patience_s: float = Field(10.0, gt=0, description="How long a run waits for a store that is away.")
    reader_buffer_bytes: int = Field(65_536, ge=4096, description="Most bytes of a run kept in memory for its readers.")
    reader_stall_s: float = Field(30.0, gt=0, description="A reader that takes nothing for this long is dropped.")
    ping_s: float = Field(15.0, gt=0, description="Silence on a stream of events after which a comment is sent.")
    drain_timeout_s: float = Field(60.0, gt=0, description="Time streams get to end when a process leaves.")

    plugins: tuple[str, ...] = Field(
        ("summarize", "translate", "qa", "reason", "write", "chat"), description="Plugins that may load (JSON list)."
    )
    router_threshold: float = Field(0.6, ge=0, le=1, description="Below this confidence the router asks back.")
    router_engine: bool = Field(
        False, description="Let the router ask the engine when it is unsure; see docs/router.md for when that helps."
    )
    learning: Learning = Field(
        "off",
        description="What is learned from users' corrections where a tenant has not chosen: nothing (`off`), for the "
        "`tenant` alone, for everybody (`global`).",
    )

    @field_validator("engine_door_ports")
    @classmethod
    def _are_ports(cls, value: str | None) -> str | None:
        if value is not None:
            first, last = map(int, value.split("-"))
            if not 1 <= first <= last <= 65_535:
                raise ValueError("write first-last, both from 1 to 65535")
        return value

    @property
    def home_dir(self) -> Path:
        """`home` with `~` resolved."""
        return self.home.expanduser()

    @property
    def door_ports(self) -> range:
        """The ports a replica's door may take; 0 alone stands for any free one."""
        if self.engine_door_ports is None:
            return range(1)
        first, last = map(int, self.engine_door_ports.split("-"))
        return range(first, last + 1)

    @property
    def replica_bounds(self) -> tuple[int, int]:
        """The fewest and the most engine replicas there may be."""
        least, most = self.engine_replicas_min, self.engine_replicas_max
        return (
            self.engine_replicas if least is None else min(least, self.engine_replicas),
            self.engine_replicas if most is None else max(most, self.engine_replicas),
        )

    @property
    def gateway_url(self) -> str:
        """The API's base address as seen from this machine."""
        return self.api_url or f"http://{self.host}:{self.api_port}"


def read_settings(**overrides: object) -> Settings:
    """The settings of this process; `overrides` beat the environment.

    Raises:
        SetupError: a variable is unknown or has a bad value.
    """
    known = set(Settings.model_fields)
    for variable in os.environ:
        if variable.startswith(PREFIX) and (name := variable.removeprefix(PREFIX).lower()) not in known | NOT_SETTINGS:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {PREFIX}{near[0].upper()}?" if near else "See docs/settings.md for the known ones."
            raise SetupError(f"Unknown setting {variable!r}: no part of Onebox reads it. {hint}")
    try:
        return Settings(**overrides)  # type: ignore[arg-type]  # pydantic validates
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise SetupError(
            f"Setting {PREFIX}{field.upper()} is not usable: {first['msg'].lower()} (got {first.get('input')!r}). "
            "Correct the variable or unset it."
        ) from None
