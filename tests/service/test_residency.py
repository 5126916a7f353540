"""What an engine is to hold: never more than its slots, never without proof, never from under a request."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import given
from hypothesis import strategies as st

from service.residency import DRAIN_SECONDS, LIFETIMES, Action, Holding, chosen, plan, servable

EVERY = 300.0
NOW = 1000.0
NAMES = [f"pol-{i}" for i in range(7)]


def resident(name: str, **more: object) -> Holding:
    return replace(Holding(name, is_loaded=True, proven_at=0.0), **more)  # type: ignore[arg-type]


def planned(wanted: list[str], *held: Holding, slots: int = 2, now: float = 1.0) -> list[Action]:
    return plan(wanted, {one.policy: one for one in held}, slots=slots, prove_every=EVERY, now=now)


# --- stories ---------------------------------------------------------------------------------------------


def test_what_is_wanted_comes_in_the_order_of_its_need_and_as_much_as_fits():
    assert planned(["c", "a", "b"]) == [("load", "c"), ("prove", "c"), ("load", "a"), ("prove", "a")]


def test_what_nothing_points_at_stays_while_there_is_room():
    assert planned(["a"], resident("a"), resident("old")) == []


def test_for_want_of_room_the_least_recently_used_leaves_and_what_is_wanted_never_does():
    held = [resident("a"), resident("old", last_used_at=5.0), resident("older", last_used_at=2.0)]
    assert planned(["a", "new"], *held, slots=3) == [("drain", "older"), ("unload", "older")]
    # The slot is free in the next look, not before.
    assert planned(["a", "new"], *held[:2], slots=3) == [("load", "new"), ("prove", "new")]


def test_a_request_under_way_is_waited_for_but_not_for_ever():
    busy = resident("old", in_flight=1)
    assert planned(["new"], busy, slots=1, now=10.0) == [("drain", "old")]
    drained = replace(busy, leaves_at=10.0 + DRAIN_SECONDS)
    assert planned(["new"], drained, slots=1, now=11.0) == []
    assert planned(["new"], drained, slots=1, now=10.0 + DRAIN_SECONDS) == [("unload", "old")]
    assert planned(["new"], replace(drained, in_flight=0), slots=1, now=11.0) == [("unload", "old")]


def test_what_is_drained_and_wanted_again_is_kept():
    assert planned(["a"], resident("a", leaves_at=50.0)) == [("keep", "a")]


def test_of_two_the_idle_one_leaves_though_the_busy_one_was_used_before():
    held = resident("busy", in_flight=1, last_used_at=1.0), resident("idle", last_used_at=9.0)
    assert planned(["new"], *held)[0] == ("drain", "idle")


def test_what_is_barred_leaves_whoever_wants_it_and_its_slot_goes_to_the_next():
    barred = resident("a", is_barred=True)
    assert chosen(["a", "b", "c"], {"a": barred}, 2) == ["b", "c"]
    # Of b and c one has room beside it already.
    assert planned(["a", "b", "c"], barred) == [("drain", "a"), ("unload", "a"), ("load", "b"), ("prove", "b")]


def test_what_has_just_failed_is_left_alone_and_nobody_leaves_for_it():
    failed = Holding("new", retry_at=9.0)
    assert planned(["new"], resident("old"), failed, slots=1, now=8.0) == []
    assert planned(["new"], resident("old"), failed, slots=1, now=9.0)[0] == ("drain", "old")


def test_a_proof_grows_old_is_made_anew_and_runs_out():
    held = resident("a", proven_at=0.0)
    assert planned(["a"], held, now=EVERY - 1) == []
    assert planned(["a"], held, now=EVERY) == [("prove", "a")]
    assert servable([held], EVERY, LIFETIMES * EVERY - 1) == {"a"}
    assert servable([held], EVERY, LIFETIMES * EVERY) == frozenset()


def test_only_what_is_there_proved_and_not_leaving_may_be_asked_for():
    held = [
        resident("ok"), resident("unproved", proven_at=None), resident("leaving", leaves_at=9.0),
        resident("barred", is_barred=True), Holding("gone", proven_at=0.0),
    ]  # fmt: skip
    assert servable(held, EVERY, 1.0) == {"ok"}


# --- every story -----------------------------------------------------------------------------------------

HOLDINGS = st.builds(
    Holding,
    policy=st.sampled_from(NAMES),
    is_loaded=st.booleans(),
    is_barred=st.booleans(),
    proven_at=st.one_of(st.none(), st.floats(0, 1000)),
    retry_at=st.floats(0, 2000),
    in_flight=st.integers(0, 2),
    last_used_at=st.floats(0, 1000),
    leaves_at=st.one_of(st.none(), st.floats(0, NOW + DRAIN_SECONDS)),
)
SCENES = st.tuples(
    st.lists(st.sampled_from(NAMES), unique=True),
    st.lists(HOLDINGS, unique_by=lambda one: one.policy),
    st.integers(1, 5),
)


@dataclass
class Engine:
    """What becomes of the holdings when the plan is carried out."""

    held: dict[str, Holding]
    now: float

    def loaded(self) -> set[str]:
        return {name for name, one in self.held.items() if one.is_loaded}

    def carry_out(self, action: Action) -> None:
        one = self.held.get(action.policy, Holding(action.policy))
        match action.deed:
            case "drain":
                one = replace(one, leaves_at=self.now + DRAIN_SECONDS)
            case "keep":
                one = replace(one, leaves_at=None)
            case "unload":
                one = replace(one, is_loaded=False, proven_at=None, leaves_at=None)
            case "load":
                one = replace(one, is_loaded=True)
            case "prove":
                one = replace(one, proven_at=self.now)
        self.held[action.policy] = one


@given(SCENES)
def test_no_plan_fills_more_slots_than_there_are_or_takes_an_adapter_from_under_a_request(scene):
    wanted, holdings, slots = scene
    held, now = {one.policy: one for one in holdings}, NOW
    actions = plan(wanted, held, slots=slots, prove_every=EVERY, now=now)
    engine = Engine(dict(held), now)
    had = len(engine.loaded())
    keep = chosen(wanted, held, slots)
    for deed, policy in actions:
        one = engine.held.get(policy, Holding(policy))
        if deed == "unload":
            assert one.leaves_at is not None, "drained before it is unloaded"
            assert one.in_flight == 0 or now >= one.leaves_at
            assert one.is_barred or policy not in keep
        if deed == "load":
            assert policy in keep
            assert not one.is_loaded
            assert one.retry_at <= now
        if deed == "prove":
            assert one.is_loaded
            assert not one.is_barred
        engine.carry_out(Action(deed, policy))
        assert len(engine.loaded()) <= max(slots, had)
    evicted = [held[policy] for deed, policy in actions if deed == "drain" and not held[policy].is_barred]
    spared = [one for one in held.values() if one.is_loaded and one.policy not in keep and not one.is_barred]
    spared = [one for one in spared if one not in evicted and one.leaves_at is None and not one.in_flight]
    assert all(a.last_used_at <= b.last_used_at for a in evicted if not a.in_flight for b in spared)


@given(SCENES)
def test_carried_out_again_and_again_it_comes_to_rest_with_what_is_wanted_there_and_proved(scene):
    wanted, holdings, slots = scene
    engine = Engine({one.policy: replace(one, retry_at=0.0) for one in holdings}, NOW)
    for _ in range(4):
        for action in plan(wanted, engine.held, slots=slots, prove_every=EVERY, now=engine.now):
            engine.carry_out(action)
        # Whoever waits is answered, or has waited long enough.
        engine.now += DRAIN_SECONDS
    assert plan(wanted, engine.held, slots=slots, prove_every=EVERY, now=engine.now - DRAIN_SECONDS) == []
    assert len(engine.loaded()) <= slots
    assert set(chosen(wanted, engine.held, slots)) <= servable(engine.held.values(), EVERY, engine.now - DRAIN_SECONDS)
    assert not any(one.is_loaded and one.is_barred for one in engine.held.values())


@given(SCENES)
def test_the_same_look_gives_the_same_plan_in_whatever_order_it_is_told(scene):
    wanted, holdings, slots = scene
    orders = [{one.policy: one for one in order} for order in (holdings, holdings[::-1])]
    plans = [plan(wanted, held, slots=slots, prove_every=EVERY, now=NOW) for held in orders]
    assert plans[0] == plans[1]
