"""The order of admission: nothing lost, nothing twice, never more than the budget, and fair between keys."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.fair_queue import MAX_WAITING, FairQueue, Owner, Ticket

KEYS = st.sampled_from("abcd")
COSTS = st.integers(1, 150)
BUDGET = 100


def owner(name: str) -> Owner:
    """`key`, of the tenant that most tests have, or `tenant/key`."""
    tenant, _, key = name.rpartition("/")
    return Owner(tenant or "default", key)


def entered(queue: FairQueue, name: str, *costs: int) -> list[Ticket]:
    return [queue.enter(owner(name), cost) for cost in costs]


def order_of(queue: FairQueue, running: list[Ticket]) -> list[Ticket]:
    """Everything that is admitted from here on, while what runs ends in its order."""
    order = queue.admit(0.0)
    running = [*running, *order]
    while running:
        queue.leave(running.pop(0), 0.0)
        admitted = queue.admit(0.0)
        order += admitted
        running += admitted
    return order


# --- the order, by hand ----------------------------------------------------------------------------------


def test_what_fits_is_admitted_at_once_in_its_order():
    queue = FairQueue(100, 1000)
    tickets = entered(queue, "a", 40, 40, 40)
    assert queue.admit(0.0) == tickets[:2]
    assert (queue.tokens_in_flight, queue.tokens_waiting, queue.num_waiting) == (80, 40, 1)
    queue.leave(tickets[0], 1.0)
    assert queue.admit(1.0) == tickets[2:]


def test_a_new_key_is_next_however_many_of_another_wait():
    queue = FairQueue(10, 100_000)
    [running, *waiting] = entered(queue, "greedy", *[10] * 1001)
    assert queue.admit(0.0) == [running]
    [newcomer] = entered(queue, "new", 10)
    queue.leave(running, 1.0)
    assert queue.admit(1.0) == [newcomer]
    queue.leave(newcomer, 2.0)
    assert queue.admit(2.0) == waiting[:1]


def test_keys_share_tokens_not_requests():
    """a's requests are three times as large as b's: b has three turns for each of a's."""
    queue = FairQueue(30, 10_000)
    entered(queue, "a", *[30] * 5)
    entered(queue, "b", *[10] * 15)
    assert "".join(ticket.owner.key for ticket in order_of(queue, [])) == "abbb" * 5


def test_whoever_was_idle_has_saved_up_nothing():
    """b comes after a had 100 turns alone; from then on they alternate."""
    queue = FairQueue(1, 10_000)
    order = []
    entered(queue, "a", *[1] * 200)
    for turn in range(110):
        if turn == 100:
            entered(queue, "b", *[1] * 5)
        [ticket] = queue.admit(0.0)
        order.append(ticket.owner.key)
        queue.leave(ticket, 0.0)
    assert "".join(order[100:]) == "bababababa"


def test_a_large_request_is_waited_for_and_runs_alone():
    queue = FairQueue(100, 10_000)
    [small] = entered(queue, "a", 50)
    queue.admit(0.0)
    [large] = entered(queue, "b", 500)
    [behind] = entered(queue, "c", 10)
    assert queue.admit(0.0) == []
    assert not queue.fits(10), "there is room, and somebody before it"
    queue.leave(small, 1.0)
    assert queue.admit(1.0) == [large]
    assert queue.admit(1.0) == []
    queue.leave(large, 2.0)
    assert queue.admit(2.0) == [behind]


# --- tenants ---------------------------------------------------------------------------------------------


def test_a_tenant_with_many_keys_gets_what_one_with_a_single_key_gets():
    """Ten keys with ten requests each against one with a hundred: until all are served, turn by turn."""
    queue = FairQueue(10, 100_000)
    for number in range(10):
        entered(queue, f"many/{number}", *[10] * 10)
    entered(queue, "single/a", *[10] * 100)
    order = order_of(queue, [])
    assert [ticket.owner.tenant for ticket in order] == ["many", "single"] * 100
    # Within the tenant its keys take turns.
    assert [ticket.owner.key for ticket in order[::2]] == [str(number) for number in range(10)] * 10


def test_a_key_that_was_never_seen_gives_its_tenant_no_turn_of_its_own():
    """A thousand keys with one request each, against one that has three."""
    queue = FairQueue(10, 1_000_000)
    for number in range(1000):
        entered(queue, f"many/{number}", 10)
    entered(queue, "single/a", 10, 10, 10)
    assert [ticket.owner.tenant for ticket in order_of(queue, [])][:6] == ["many", "single"] * 3


def test_what_a_key_had_counts_in_its_tenant_when_its_tenant_has_nothing_waiting_in_between():
    queue = FairQueue(10, 1000)
    for ticket in entered(queue, "t/a", 10, 10, 10):
        queue.admit(0.0)
        queue.leave(ticket, 0.0)
    [late_a], [early_b] = entered(queue, "t/a", 10), entered(queue, "t/b", 10)
    assert order_of(queue, []) == [early_b, late_a]


def test_the_wait_of_a_key_whose_tenant_has_much_waiting():
    queue = FairQueue(10, 10_000)
    [first] = entered(queue, "many/a", 10)
    queue.admit(0.0)
    queue.leave(first, 1.0)
    for number in range(10):
        entered(queue, f"many/{number}", 10)
    queue.admit(1.0)
    # 10 in flight, and the nine that wait: of a budget of 10 each takes a second. Another tenant waits for the first.
    assert queue.expected_wait(owner("many/5"), 10) == pytest.approx(10.0)
    assert queue.expected_wait(owner("single/a"), 10) == pytest.approx(1.0)


def test_a_tenant_fills_two_thirds_of_the_queue_with_however_many_keys():
    queue = FairQueue(1, 90_000)
    keys = [owner(f"many/{number}") for number in range(1000)]
    while room := [key for key in keys if queue.has_room(key, 30)]:
        queue.enter(room[0], 30)
    assert queue.tokens_waiting == 60_000
    assert queue.has_room(owner("single/a"), 10_000)


def test_of_tenants_that_are_gone_nothing_is_kept():
    """One comes again and again, and so what the others had is soon long ago."""
    queue = FairQueue(1, 10**9)
    for number in range(3 * MAX_WAITING):
        for name in (f"{number}/a", "regular/a"):
            [ticket] = entered(queue, name, 1)
            queue.admit(0.0)
            queue.leave(ticket, 0.0)
    assert len(queue._keys) <= MAX_WAITING + 2


# --- how long, and how much room -------------------------------------------------------------------------


def test_the_wait_is_what_must_leave_before_at_the_pace_of_a_full_budget():
    queue = FairQueue(100, 10_000)
    assert queue.expected_wait(owner("a"), 100) == 0.0
    [first] = entered(queue, "a", 100)
    queue.admit(0.0)
    assert queue.expected_wait(owner("a"), 100) == 0.0, "nothing is known before something has finished"
    queue.leave(first, 4.0)
    entered(queue, "a", 100, 100, 100)
    queue.admit(4.0)
    # 100 in flight, 200 of a's own before it, 100 of itself, all but 100 must leave: 300 tokens, 4 s for each 100.
    assert queue.expected_wait(owner("a"), 100) == pytest.approx(12.0)
    # A new key waits only for what is in flight.
    assert queue.expected_wait(owner("b"), 100) == pytest.approx(4.0)
    # A giant waits until it is alone.
    assert queue.expected_wait(owner("b"), 10**9) == pytest.approx(4.0)


def test_one_key_fills_half_of_the_queue_and_a_newcomer_finds_room():
    queue = FairQueue(1, 100_000)
    while queue.has_room(owner("greedy"), 1000):
        queue.enter(owner("greedy"), 1000)
    assert queue.tokens_waiting == 50_000
    assert queue.has_room(owner("new"), 1000)
    assert not queue.has_room(owner("greedy"), 1000)


def test_small_requests_fill_the_queue_by_their_number():
    queue = FairQueue(1, 100 * MAX_WAITING)
    while queue.has_room(owner("greedy"), 1):
        queue.enter(owner("greedy"), 1)
    assert queue.num_waiting == MAX_WAITING // 2


def test_a_request_larger_than_the_queue_waits_alone():
    queue = FairQueue(10, 20)
    assert queue.has_room(owner("a"), 50)
    queue.enter(owner("a"), 50)
    assert not queue.has_room(owner("b"), 5)


def test_a_queue_without_room_holds_nobody():
    assert not FairQueue(10, 0).has_room(owner("a"), 5)


# --- whatever happens ------------------------------------------------------------------------------------


class Life(RuleBasedStateMachine):
    """Requests come, wait, run, end and give up in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = FairQueue(BUDGET, 1000)
        self.waiting: list[Ticket] = []
        self.running: list[Ticket] = []
        self.now = 0.0

    @rule(key=KEYS, cost=COSTS)
    def comes(self, key, cost):
        self.waiting.append(self.queue.enter(owner(key), cost))
        self.turn()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def ends(self, data):
        ticket = data.draw(st.sampled_from(self.running))
        self.running.remove(ticket)
        self.queue.leave(ticket, self.now)
        self.turn()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def gives_up(self, data):
        ticket = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(ticket)
        self.queue.leave(ticket, self.now)
        self.turn()

    def turn(self):
        self.now += 1.0
        for ticket in self.queue.admit(self.now):
            self.waiting.remove(ticket)  # fails when it was admitted before, or never came
            self.running.append(ticket)

    @invariant()
    def counts_are_right(self):
        assert self.queue.tokens_in_flight == sum(ticket.cost for ticket in self.running)
        assert self.queue.num_in_flight == len(self.running)
        assert self.queue.tokens_waiting == sum(ticket.cost for ticket in self.waiting)
        assert self.queue.num_waiting == len(self.waiting)

    @invariant()
    def in_flight_stays_within_the_budget_unless_one_runs_alone(self):
        assert self.queue.tokens_in_flight <= BUDGET or len(self.running) == 1

    @invariant()
    def nobody_waits_while_nothing_runs(self):
        assert self.running or not self.waiting

    @invariant()
    def a_key_is_served_in_its_order(self):
        for key in "abcd":
            waiting = [ticket.number for ticket in self.waiting if ticket.owner.key == key]
            running = [ticket.number for ticket in self.running if ticket.owner.key == key]
            assert not waiting or not running or max(running) < min(waiting)

    def teardown(self):
        """Everything that came is admitted in the end."""
        while self.running:
            self.queue.leave(self.running.pop(0), self.now)
            self.turn()
        assert not self.waiting


TestLife = Life.TestCase


@given(
    st.lists(st.lists(COSTS, min_size=1, max_size=30), min_size=2, max_size=4),
    st.integers(1, 300),
)
def test_keys_that_wait_differ_by_at_most_one_request_of_each(costs, budget):
    """Over every stretch in which two keys both wait, their admitted tokens differ by at most the largest request of
    the one plus the largest of the other."""
    queue = FairQueue(budget, 10**6)
    for key, of_key in enumerate(costs):
        entered(queue, str(key), *of_key)
    left = [len(of_key) for of_key in costs]
    served = [0] * len(costs)
    history = [tuple(served)]
    for ticket in order_of(queue, []):
        served[int(ticket.owner.key)] += ticket.cost
        left[int(ticket.owner.key)] -= 1
        if not all(left):
            break
        history.append(tuple(served))
    for i, j in combinations(range(len(costs)), 2):
        ahead = [row[i] - row[j] for row in history]
        assert max(ahead) - min(ahead) <= max(costs[i]) + max(costs[j])


@given(st.lists(st.tuples(KEYS, COSTS), min_size=20, max_size=60), st.integers(1, 300), st.integers(0, 10))
def test_a_newcomer_is_behind_at_most_one_request_of_every_other_key(waiting, budget, turns):
    queue = FairQueue(budget, 10**6)
    for key, cost in waiting:
        queue.enter(owner(key), cost)
    running = queue.admit(0.0)
    for _ in range(turns):
        queue.leave(running.pop(0), 0.0)
        running += queue.admit(0.0)
        if not running:
            return
    newcomer = queue.enter(owner("new"), 7)
    order = order_of(queue, running)
    before = [ticket.owner.key for ticket in order[: order.index(newcomer)]]
    assert len(before) == len(set(before))
