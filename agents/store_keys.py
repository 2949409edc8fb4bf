"""The names of things in the store; all of one tenant's share a hash tag, so a Redis cluster keeps them together."""

from typing import Final

TENANTS: Final = "onebox:tenants"
SEARCHER: Final = "onebox:searcher"  # the worker that looks for lost runs just now
LABELS_VERSION: Final = "onebox:{labels}:version"  # counts the changes of labels
LABELS_CHANGED: Final = "onebox:{labels}:changed"  # tenants by the version at which their labels last changed


class ConversationKeys:
    """The Redis keys of one conversation."""

    def __init__(self, tenant: str, identifier: str) -> None:
        base = f"onebox:{{{tenant}}}:conversation:{identifier}"
        self.conversation = base
        self.turns = f"{base}:turns"
        self.order = f"{base}:order"
        self.variants = f"{base}:variants"
        self.feedback = f"{base}:feedback"
        self.lock = f"{base}:lock"
        self.index = conversation_index(tenant)


class RunKeys:
    """The Redis keys of one run."""

    def __init__(self, tenant: str, run_id: str) -> None:
        self.prefix = f"onebox:{{{tenant}}}:run:"
        self.run = f"{self.prefix}{run_id}"
        self.events = f"{self.run}:events"
        self.journal = f"{self.run}:journal"
        self.leases = f"onebox:{{{tenant}}}:leases"


class LabelKeys:
    """The Redis keys of a tenant's labels."""

    def __init__(self, tenant: str) -> None:
        self.labels = f"onebox:{{{tenant}}}:labels"
        self.order = f"{self.labels}:order"
        self.learning = f"onebox:{{{tenant}}}:learning"


def conversation_index(tenant: str) -> str:
    """The sorted set of a tenant's conversations."""
    return f"onebox:{{{tenant}}}:conversations"


def idempotency_key(tenant: str, key: str | None) -> str:
    """The hash of an idempotency key."""
    return f"onebox:{{{tenant}}}:idempotency:{key or ''}"
