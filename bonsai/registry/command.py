"""The commands `bonsai policies`, `audit` and `rebuild`: what a user can say. Everything else is imported when it
runs."""

from __future__ import annotations

import asyncio
import getpass
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bonsai.engines import LORA_RANKS
from bonsai.shared_options import REDIS_URL, stack_directory

if TYPE_CHECKING:
    import redis

    from bonsai.registry.importing import Base

DIRECTORY = stack_directory("Of the stack.")
POLICY = click.option("--policy", default="", metavar="MODEL", help="The stack's base model, as for `bonsai up`.")


@click.group("policies")
def policies_command() -> None:
    """Policies out of the registry, and into it."""


@policies_command.command("export")
@click.argument("policy_id")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--merged", is_flag=True, help="A whole model in float32 instead of an adapter.")
@POLICY
@DIRECTORY
def export(policy_id: str, target: Path, merged: bool, policy: str, directory: Path) -> None:
    """Write POLICY_ID (or a tag) to TARGET, a new directory that peft and vLLM load unchanged."""
    from bonsai.registry.exporting import exported

    with _failures_told():
        if target.exists():
            raise FileExistsError(f"{target} exists already")
        base = _base(directory, policy)
        asyncio.run(exported(directory, policy_id, target, base.directory, merged=merged))
        click.echo(f"{policy_id} is in {target}; its base is {base.directory}")


@policies_command.command("import")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--n", type=click.IntRange(1, 4096), required=True, help="The best-of-n that it stands in for.")
@click.option("--max-lora-rank", type=click.Choice(LORA_RANKS), default=8, show_default=True, help="Of the engine.")
@POLICY
@DIRECTORY
def import_(source: Path, n: int, max_lora_rank: int, policy: str, directory: Path) -> None:
    """Register the PEFT adapter in SOURCE as a candidate: LoRA, safetensors, for the stack's base model."""
    from bon_algos.contracts import DEFAULT_TENANT
    from bonsai.registry.exporting import registered
    from bonsai.registry.importing import import_adapter
    from bonsai.registry.stack import state_of

    with _failures_told():
        manifest = import_adapter(
            source,
            _base(directory, policy),
            state_of(directory).artefacts,
            n=n,
            max_rank=int(max_lora_rank),
            by=getpass.getuser(),
            tenant=DEFAULT_TENANT,
        )
        asyncio.run(registered(directory, manifest.digest))
        click.echo(f"{manifest.policy_id} is a candidate; GET /policies/{manifest.policy_id} shows when it is proven")


@click.group("audit")
def audit_command() -> None:
    """The audit of the registry."""


@audit_command.command("verify")
@click.option("--contains", metavar="DIGEST", help="A digest noted earlier, which must still be in the chain.")
@DIRECTORY
@REDIS_URL
def verify(contains: str | None, directory: Path, redis_url: str | None) -> None:
    """Check that no entry was changed, removed or moved. Status 1 and the place if one was."""
    from bonsai.registry.auditing import verified_audit

    with _failures_told(), _redis(directory, redis_url) as client:
        head = verified_audit(client, contains)
        click.echo(f"{head.entries} entries are whole; the newest one's digest is {head.digest}")


@click.command("rebuild")
@click.option("--dry-run", is_flag=True, help="Say what would be restored, and restore nothing.")
@DIRECTORY
@REDIS_URL
def rebuild_command(dry_run: bool, directory: Path, redis_url: str | None) -> None:
    """Restore registry and jobs from the artefact directory after Redis was lost."""
    from bonsai.registry.rebuild import counts, is_nothing, missing_from, read_artefacts, restore
    from bonsai.registry.stack import state_of

    with _failures_told(), _redis(directory, redis_url) as client:
        found = read_artefacts(state_of(directory).artefacts)
        for remark in found.remarks:
            click.echo(f"note: {remark}")
        missing = missing_from(client, found) if dry_run else restore(client, found)
        if is_nothing(missing):
            click.echo("nothing is missing")
            return
        told = ", ".join(f"{count} {name}" for name, count in counts(missing) if count)
        click.echo(f"{'would restore' if dry_run else 'restored'} {told or 'the name of the registry'}")


def _base(directory: Path, policy: str) -> Base:
    from bonsai import model_directory
    from bonsai.registry.importing import Base
    from bonsai.stack_plan import SHIPPED_MODELS

    path = model_directory.resolve(policy, "policy", SHIPPED_MODELS / "policy")
    found = model_directory.open_model(path, "policy", 2**20)
    digest = model_directory.model_digest(found.path, directory / "model-digests.json")
    return Base(found.path, model_directory.policy_id(digest))


@contextmanager
def _redis(directory: Path, redis_url: str | None) -> Iterator[redis.Redis]:
    import redis

    from bonsai.registry.stack import redis_url_of

    with redis.Redis.from_url(redis_url_of(directory, redis_url), decode_responses=True) as client:
        yield client


@contextmanager
def _failures_told() -> Iterator[None]:
    """Status 1 and the reason for a failure that we know."""
    from redis.exceptions import RedisError

    from bonsai.client import BonsaiError
    from bonsai.model_directory import BadModel
    from bonsai.registry.importing import AdapterRefused
    from bonsai.registry.rebuild import RegistryInUse
    from bonsai.registry.stack import NoStack
    from service.audit import AuditBroken
    from service.journal import UnreadableJournal

    known = (AdapterRefused, AuditBroken, BadModel, BonsaiError, NoStack, OSError, RedisError, RegistryInUse)
    try:
        yield
    except (*known, UnreadableJournal, ValueError) as error:
        click.echo(f"failed {error}", err=True)
        sys.exit(1)
