"""What a job's `training` may ask for together with its method, and of the policy it begins with.

Owns the refusals that a record by itself cannot make. Does not own the limits of the installation (`jobs`), nor what
only the files of a policy tell: the worker looks at those.
"""

from __future__ import annotations

from bon_algos.contracts import OFFLINE_METHODS, JobSpec, PolicyRecord, TrainingSetup
from service.errors import InvalidField


def check_training(spec: JobSpec) -> None:
    """Raises InvalidField."""
    setup, method = spec.training, spec.method.type
    if method == "interpolation":
        if setup != TrainingSetup():
            raise InvalidField("interpolation trains nothing; leave training out", param="training")
        return
    if setup.weights == "full" and method not in OFFLINE_METHODS:
        able = ", ".join(OFFLINE_METHODS)
        message = f"{method} needs an engine that samples the policy, and none serves full weights; take one of {able}"
        raise InvalidField(message, param="training.weights")
    if setup.weights == "full" and setup.start_from != "base":
        raise InvalidField("full weights begin as the base; a policy's adapter is lora", param="training.start_from")
    if setup.accumulation > (prompts := spec.method.algorithm.prompts_per_step):
        message = f"a micro-batch is of a prompt at least, and a step has {prompts} (prompts_per_step)"
        raise InvalidField(message, param="training.accumulation")


def require_adapter(policy: PolicyRecord, param: str) -> None:
    """Raises InvalidField for a policy without an adapter that a worker could open."""
    if policy.kind != "lora":
        of = "the base itself" if policy.kind == "base" else "one of full weights, for export"
        raise InvalidField(f"{policy.id} is no adapter but {of}; name a LoRA policy", param=param)


def require_untainted(policy: PolicyRecord, param: str) -> None:
    """Raises InvalidField for a policy that nobody may learn from any more."""
    if policy.state == "failed" or policy.tainted:
        why = "is tainted: rows that it learned from were erased" if policy.tainted else "failed its fingerprint"
        raise InvalidField(f"{policy.id} {why}; name another policy", param=param, code="policy_unusable")


def require_parent(policy: PolicyRecord, base_policy: str | None, param: str) -> None:
    """base_policy: of the route; None: not known. Raises InvalidField for a policy that none is made from: it is out of
    use, or stands on another base."""
    if policy.state == "retired":
        message = f"{policy.id} is retired; roll a route back to it first, or name a policy that is in use"
        raise InvalidField(message, param=param, code="policy_retired")
    own = None if policy.manifest is None else policy.manifest.base_policy_id
    if None not in (own, base_policy) and own != base_policy:
        message = f"{policy.id} stands on {own}, and the route on {base_policy}; name a policy of the same base"
        raise InvalidField(message, param=param, code="other_base")


def check_parent(spec: JobSpec, parent: PolicyRecord) -> None:
    """Raises InvalidField where the method's adapter cannot hold the parent's."""
    method, written = spec.method.algorithm, parent.manifest
    if written is None:
        return
    held: dict[str, float] = {"lora_rank": written.lora_rank}
    if written.spec is not None and written.spec.method.interpolation is None:
        held["lora_alpha"] = written.spec.method.algorithm.lora_alpha
    for name, value in held.items():
        if getattr(method, name) != value:
            message = f"{parent.id} has {name} {value:g}, and the method asks for {getattr(method, name):g}"
            raise InvalidField(f"{message}: give the method the policy's", param=f"method.{spec.method.type}.{name}")
