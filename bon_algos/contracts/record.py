"""What every record is: frozen, and strict about what it does not know. And the names of things inside records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION: Final = 1
DEFAULT_TENANT: Final = "default"

POLICY_ID_PATTERN: Final = r"^pol-[0-9a-f]{16}$"
ROUTE_PATTERN: Final = r"^[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?$"
TENANT_PATTERN: Final = r"^[a-z0-9-]{1,32}$"
TAG_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9_.:/-]{0,63}$"
FILE_ID_PATTERN: Final = r"^file-[0-9a-f]{32}$"
PolicyId = Annotated[str, Field(pattern=POLICY_ID_PATTERN)]
RouteName = Annotated[str, Field(pattern=ROUTE_PATTERN)]
Tenant = Annotated[str, Field(pattern=TENANT_PATTERN)]
Tag = Annotated[str, Field(pattern=TAG_PATTERN)]
"""What a caller calls some of its requests, to find them again."""
FileId = Annotated[str, Field(pattern=FILE_ID_PATTERN)]


class Record(BaseModel):
    """Frozen, and refuses what it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, in three fifths of the instructions: a record has its fields and nothing beside them. What is
        updated is not checked. deep has no meaning here, for all of a record is frozen."""
        changed, copied, give = update or {}, object.__new__(type(self)), object.__setattr__
        give(copied, "__dict__", {**self.__dict__, **changed})
        give(copied, "__pydantic_fields_set__", self.__pydantic_fields_set__.union(changed))
        give(copied, "__pydantic_extra__", None)
        give(copied, "__pydantic_private__", None)
        return copied
