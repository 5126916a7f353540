"""Names both processes use: the task, the queue, and the Redis keys (the data model is docs/redis.md)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import sha256
from types import MappingProxyType
from typing import Final

from bon_algos.contracts.job_states import JOB_PREFIX, JobPriority
from bon_algos.contracts.record import DEFAULT_TENANT

DISTILL_TASK: Final = "bonsai.distill"
DISTILL_QUEUES: Final[Mapping[JobPriority, str]] = MappingProxyType(
    {"high": "bonsai-distill-1-high", "normal": "bonsai-distill-2-normal", "low": "bonsai-distill-3-low"}
)
"""One queue for each class. The names sort as the classes do, which is how a worker tells what comes first."""

LEDGER_STREAM: Final = "bonsai:ledger"
LEDGER_COUNTS: Final = "bonsai:ledger:counts"
"""Hash `of_tenant` route -> groups with `is_unbiased`, counted by the script that delivers them."""
LEDGER_CONSUMERS: Final = "compactor"
"""The stream's consumer group: who moves it into the archive."""
COMPACTOR_LEASE: Final = "bonsai:compactor"
"""Which process writes into the archive."""
COMPACTOR_EPOCH: Final = "bonsai:compactor:epoch"
"""How often that changed: what a writer makes has its number in its name."""
ERASURES: Final = "bonsai:erasures"
"""Hash erasure id -> Erasure as JSON, of all tenants."""
SPOOLS: Final = "bonsai:spools"
"""Hash spool -> until when nothing older is in it or will come into it (seconds), as it last told: the rest is in the
stream, or was."""
AUDIT_STREAM: Final = "bonsai:audit"
OPEN_JOBS: Final = "bonsai:jobs:open"
"""Set of the jobs the reconciler still looks at; it takes out the finished ones itself."""
POLICIES_INDEX: Final = "bonsai:policies"
POLICIES_DELETED: Final = "bonsai:policies:deleted"
"""Sorted set policy -> when it was deleted. Its name is never used again."""
REGISTRY: Final = "bonsai:registry"
"""Names this registry: another name means that Redis was lost, or is another one."""
ROUTES_INDEX: Final = "bonsai:routes"
"""Set of the routes' names, each as `of_tenant` gives it."""
TAGS: Final = "bonsai:tags"
"""Hash `of_tenant` tag -> the policy that it names."""
KEYS: Final = "bonsai:keys"
"""Hash key id -> what is known of the API key; of the key itself a keyed hash."""
KEYS_USED: Final = "bonsai:keys:used"
"""Hash key id -> the hour it was last used in."""
WEBHOOKS: Final = "bonsai:webhooks"
"""Hash webhook id -> what is known of the webhook, of all tenants; its secret is not."""
WEBHOOKS_READ: Final = "bonsai:webhooks:read"
"""The entry of the audit up to which it has become deliveries."""
WEBHOOKS_DUE: Final = "bonsai:webhooks:due"
"""Sorted set webhook id -> when its next delivery is due (ms)."""
WEBHOOKS_ACCEPTED: Final = "bonsai:webhooks:accepted"
"""Hash webhook id -> when it last accepted a delivery (ms)."""
RECONCILER_LEASE: Final = "bonsai:reconciler"
CIRCLES_INDEX: Final = "bonsai:circles"
"""Set of the routes that have a circle, each as `of_tenant` gives it."""
CIRCLES_LEASE: Final = "bonsai:circles:lease"
"""Which gateway drives circles."""
BROKER_PREFIX: Final = "bonsai:celery:"


def seen_key(record_id: str) -> str:
    """Marks a ledger record as delivered, so that a replayed spool delivers it once. Expires after 24 h."""
    return f"bonsai:seen:{record_id}"


def feedback_key(target: str) -> str:
    """Hash question -> the Feedback that counts, of one group (its id) or one session (`session-` and its hash)."""
    return f"bonsai:feedback:{target}"


def target_of(group_id: str | None, session: str | None, tenant: str = DEFAULT_TENANT) -> str:
    """What feedback is kept under: a group's id, or a hash of a session, whose name may be anything, and its tenant."""
    # No session's name can hold a NUL.
    named = session or "" if tenant == DEFAULT_TENANT else f"{tenant}\0{session}"
    return group_id or f"session-{sha256(named.encode()).hexdigest()[:32]}"


def erasure_targets_key(erasure_id: str) -> str:
    """Set of what an erasure is about, as feedback is kept under it (`target_of`): what is found or arrives later about
    one of them goes too."""
    return f"bonsai:erasure:{erasure_id}:targets"


SHADOW_PREFIX: Final = "shadow_"
"""Before the id of a group that was served: the one that the route's shadow drew beside it."""


def served_id(group_id: str) -> str:
    """Of the group that was served, which a shadow's stands beside."""
    return group_id.removeprefix(SHADOW_PREFIX)


def of_tenant(tenant: str, route: str) -> str:
    """A route's name among those of all tenants: bare for the tenant `default`. Neither name can hold a slash."""
    return route if tenant == DEFAULT_TENANT else f"{tenant}/{route}"


def own_name(tenant: str, name: str) -> str | None:
    """The inverse of `of_tenant`: the bare name; None for a name of another tenant."""
    bare = name.rpartition("/")[2]
    return bare if of_tenant(tenant, bare) == name else None


def own_names(tenant: str, names: Iterable[str]) -> list[str]:
    """The bare ones of those that are the tenant's, sorted."""
    return sorted(bare for name in names if (bare := own_name(tenant, name)) is not None)


def jobs_index(tenant: str = DEFAULT_TENANT) -> str:
    return "bonsai:jobs" if tenant == DEFAULT_TENANT else f"bonsai:jobs-of:{tenant}"


FILES_SINCE: Final = "bonsai:files:since"
"""Since when this Redis has the records of uploads; Unix seconds."""


def files_key(tenant: str = DEFAULT_TENANT) -> str:
    """Hash file id -> FileRecord."""
    return "bonsai:files" if tenant == DEFAULT_TENANT else f"bonsai:files-of:{tenant}"


def job_key(job_id: str) -> str:
    return f"{JOB_PREFIX}{job_id}"


def job_events_key(job_id: str) -> str:
    return f"bonsai:job:{job_id}:events"


def job_checkpoints_key(job_id: str) -> str:
    """Hash step -> when its state was kept and its metrics, of the states that the job could go on from."""
    return f"bonsai:job:{job_id}:checkpoints"


def policy_key(policy_id: str) -> str:
    return f"bonsai:policy:{policy_id}"


def route_key(route: str, tenant: str = DEFAULT_TENANT) -> str:
    return f"bonsai:route:{of_tenant(tenant, route)}"


def circle_key(route: str, tenant: str = DEFAULT_TENANT) -> str:
    return f"bonsai:circle:{of_tenant(tenant, route)}"


def experiment_key(route: str, tenant: str = DEFAULT_TENANT) -> str:
    return f"bonsai:experiment:{of_tenant(tenant, route)}"


def experiment_stats_key(experiment_id: str) -> str:
    return f"bonsai:experiment:{experiment_id}:stats"


def webhook_queue_key(webhook_id: str) -> str:
    """Sorted set event -> when it is to be delivered next (ms); while somebody delivers it, until when he may."""
    return f"bonsai:webhook:{webhook_id}:queue"


def webhook_events_key(webhook_id: str) -> str:
    """Hash event -> its Delivery, of the events in the queue."""
    return f"bonsai:webhook:{webhook_id}:events"


def webhook_attempts_key(webhook_id: str) -> str:
    """Stream of what became of the latest attempts."""
    return f"bonsai:webhook:{webhook_id}:attempts"


def idempotency_key(digest: str) -> str:
    return f"bonsai:idempotency:{digest}"
