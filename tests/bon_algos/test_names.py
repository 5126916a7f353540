"""Names of one tenant among those of all."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bon_algos.contracts import DEFAULT_TENANT, of_tenant, own_name, own_names

BARE = st.from_regex(r"[a-z0-9._-]{1,8}", fullmatch=True)
TENANT = st.sampled_from([DEFAULT_TENANT, "acme", "acme-2"])


@given(TENANT, TENANT, BARE)
def test_a_name_is_its_own_tenants_and_nobody_elses(tenant: str, other: str, bare: str):
    assert own_name(other, of_tenant(tenant, bare)) == (bare if other == tenant else None)


def test_of_all_names_a_tenants_come_bare_and_sorted():
    names = {"b", "a", "acme/c", "acme/a", "acme-2/d"}
    assert own_names(DEFAULT_TENANT, names) == ["a", "b"]
    assert own_names("acme", names) == ["a", "c"]
