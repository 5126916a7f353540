"""The body of OpenAI's `fine_tuning.jobs.create`, and the job it asks for.

Owns: what of OpenAI's members is understood, and our own under `bonsai`. Does not own: the spec (contracts.jobs), the
methods, what `training_file` may name (training_file.py).
"""

from __future__ import annotations

from typing import Any, Final, Literal, cast

from pydantic import BaseModel, Field, ValidationError

from bon_algos.contracts import (
    JobMetadata,
    JobPriority,
    JobSpec,
    Label,
    Method,
    Record,
    TrainingSetup,
    TrainingSpec,
    Window,
)
from service.catalogue import Snapshot
from service.errors import InvalidField, RouteNotFound
from service.json_body import field_error
from service.training_file import is_file, route_of

DEFAULT_ROUTE: Final[str] = JobSpec.model_fields["route"].default
OBJECTS: Final = ("method", "hyperparameters", "bonsai")
"""Members inside which a null is what their types say; beside them it counts as left out."""


class Hyperparameters(Record):
    """OpenAI's words; the method's own parameters say more."""

    batch_size: Literal["auto"] | int = "auto"
    """`prompts_per_step` of the method."""
    learning_rate_multiplier: Literal["auto"] | float = "auto"
    """Times the method's default `learning_rate`."""
    n_epochs: Literal["auto"] = "auto"
    """How long a job trains is said in the method's `steps`."""


class OwnMembers(Record):
    """What OpenAI has no member for; as in the body of `POST /distill`."""

    n: int = Field(16, ge=2, le=4096)
    window: Window = Window()
    held_out_fraction: float = Field(0.1, gt=0, lt=1)
    priority: JobPriority = "normal"
    training: TrainingSetup = TrainingSetup()


class FineTuningRequest(Record):
    """Body of `POST /v1/fine_tuning/jobs`."""

    model: str = Field(min_length=1, max_length=200)
    """A route, or the policy that the route of `training_file`, of a file the default route, is based on."""
    training_file: str = Field(min_length=1, max_length=200)
    """`ledger:` and a route's name: what was logged there. Or the id of a file."""
    method: Method
    seed: int = Field(0, ge=0, lt=2**63)
    suffix: Label | None = None
    metadata: JobMetadata = Field(default_factory=dict, max_length=16)
    hyperparameters: Hyperparameters = Hyperparameters()
    bonsai: OwnMembers = OwnMembers()

    def spec(self, snapshot: Snapshot) -> JobSpec:
        """Raises RouteNotFound for a route that is none, InvalidField for what does not fit together."""
        is_of_file = is_file(self.training_file)
        route = self._route_of_file(snapshot) if is_of_file else route_of(self.training_file)
        try:
            base = snapshot.route(route).base_policy
        except RouteNotFound as error:
            raise RouteNotFound(error.message, param="training_file") from None
        named = snapshot.routes.get(self.model)
        if (self.model if named is None else named.base_policy) != base:
            message = "model must be the policy that the route of training_file is based on, or a route based on it"
            raise InvalidField(message, param="model")
        own = {name: getattr(self.bonsai, name) for name in OwnMembers.model_fields}
        return JobSpec(
            route=route,
            training_file=self.training_file if is_of_file else None,
            method=self._method(),
            seed=self.seed,
            suffix=self.suffix,
            metadata=self.metadata,
            **own,
        )

    def _route_of_file(self, snapshot: Snapshot) -> str:
        return self.model if self.model in snapshot.routes else DEFAULT_ROUTE

    def _method(self) -> Method:
        """With what `hyperparameters` say of it."""
        said = self._said()
        if not said:
            return self.method
        name = self.method.type
        given = cast("BaseModel | None", getattr(self.method, name))
        stated: dict[str, Any] = {} if given is None else given.model_dump(exclude_unset=True)
        for parameter, (hyperparameter, value) in said.items():
            if parameter in stated:
                param = f"hyperparameters.{hyperparameter}"
                raise InvalidField(f"{param} and method.{name}.{parameter} say the same: leave one out", param=param)
            stated[parameter] = value
        try:
            return Method.model_validate({"type": name, name: stated})
        except ValidationError as error:
            raise field_error(error) from None

    def _said(self) -> dict[str, tuple[str, float]]:
        """Parameter of the method -> the hyperparameter that says it, and its value."""
        asked, spec = self.hyperparameters, self.method.spec
        said: dict[str, tuple[str, float]] = {}
        if asked.batch_size != "auto":
            said["prompts_per_step"] = ("batch_size", asked.batch_size)
        if asked.learning_rate_multiplier != "auto":
            default = type(spec).model_fields["learning_rate"].default if isinstance(spec, TrainingSpec) else 0.0
            said["learning_rate"] = ("learning_rate_multiplier", default * asked.learning_rate_multiplier)
        return said
