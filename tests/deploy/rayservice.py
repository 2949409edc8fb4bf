"""What a RayService may say, by the field reference of KubeRay 1.6; unknown fields are errors.

No package ships the schema of KubeRay's resources, so its own fields are written down here; the pods inside are checked
with Kubernetes' schemas like all others. The rules are those that the operator checks before it acts.
"""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Json = dict[str, object]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class AuthOptions(_Strict):
    """Who may talk to Ray."""

    mode: Literal["disabled", "token"]
    secretName: str | None = None


class AutoscalerOptions(_Strict):
    """The autoscaler beside the head; `resources` and the like are checked as a container's."""

    version: Literal["v1", "v2"]
    idleTimeoutSeconds: int = Field(ge=0)
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] | None = None
    image: str | None = None
    resources: Json | None = None
    securityContext: Json | None = None
    env: list[Json] | None = None


class RedisCredential(_Strict):
    """A password, or where it is."""

    value: str | None = None
    valueFrom: Json | None = None


class GcsFaultToleranceOptions(_Strict):
    """Where the head keeps what it must not forget."""

    redisAddress: str
    redisPassword: RedisCredential
    redisUsername: RedisCredential | None = None
    externalStorageNamespace: str | None = None


class HeadGroup(_Strict):
    """The head's pod."""

    rayStartParams: dict[str, str]
    template: Json
    serviceType: str | None = None
    headService: Json | None = None
    enableIngress: bool | None = None
    resources: dict[str, str] | None = None
    labels: dict[str, str] | None = None


class WorkerGroup(_Strict):
    """A kind of worker pod. Without the autoscaler both bounds are wanted."""

    groupName: str
    replicas: int = Field(ge=0)
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(ge=0)
    rayStartParams: dict[str, str]
    template: Json
    numOfHosts: int = 1
    idleTimeoutSeconds: int | None = None
    resources: dict[str, str] | None = None
    labels: dict[str, str] | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.minReplicas <= self.replicas <= self.maxReplicas:
            raise ValueError("replicas are not between minReplicas and maxReplicas")
        return self


class RayClusterSpec(_Strict):
    """The cluster."""

    rayVersion: str
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]
    authOptions: AuthOptions | None = None
    gcsFaultToleranceOptions: GcsFaultToleranceOptions | None = None
    enableInTreeAutoscaling: bool | None = None
    autoscalerOptions: AutoscalerOptions | None = None
    headServiceAnnotations: dict[str, str] | None = None
    suspend: bool | None = None

    @model_validator(mode="after")
    def _operator_accepts(self) -> Self:
        major, minor = map(int, self.rayVersion.split(".")[:2])
        if self.authOptions is not None and self.authOptions.mode == "token" and (major, minor) < (2, 52):
            raise ValueError("token authentication wants Ray 2.52")
        for group in (self.headGroupSpec, *self.workerGroupSpecs):
            if group.resources and group.rayStartParams.keys() & {"num-cpus", "num-gpus", "memory", "resources"}:
                raise ValueError("resources are set twice")
            if "labels" in group.rayStartParams:
                raise ValueError("labels belong to the group, not to rayStartParams")
        if self.gcsFaultToleranceOptions is not None and "redis-password" in self.headGroupSpec.rayStartParams:
            raise ValueError("the Redis password is set twice")
        return self


class UpgradeStrategy(_Strict):
    """How a changed cluster replaces the old one."""

    type: Literal["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]
    clusterUpgradeOptions: Json | None = None


class RayServiceSpec(_Strict):
    """The service."""

    serveConfigV2: str
    rayClusterConfig: RayClusterSpec
    upgradeStrategy: UpgradeStrategy | None = None
    rayClusterDeletionDelaySeconds: int = Field(60, ge=0)
    excludeHeadPodFromServeSvc: bool = False
    serveService: Json | None = None


class Metadata(_Strict):
    """Names; generated pods' names add to them."""

    name: str = Field(max_length=41, pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$")
    namespace: str
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


class RayService(_Strict):
    """The whole resource."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: RayServiceSpec
