"""The numbers of a report against exact enumeration, and what they are where there is nothing to measure.

The world: four outcomes with rewards 0, 1, 1 and 2, and two laws over them, the reference's and the policy's.
"""

import math

import numpy as np
import pytest

from bon_algos.order import best_of_n_law, kl_best_of_n_reference, kl_bound, win_rate_best_of_n
from tests.worker import drawn, world
from worker.judge import NOT_CONFIGURED, NoOpinion, Opinion
from worker.report import held_out, policy_report
from worker.report_frontier import Curve

REWARDS = np.array([0.0, 1.0, 1.0, 2.0])
REFERENCE = np.array([0.4, 0.2, 0.2, 0.2])
POLICY = np.array([0.1, 0.2, 0.3, 0.4])
N = 4
SECOND = "rm-" + "9" * 16


def report_of(judged, n=N, trained=frozenset(), unknown=(), **more):
    prompts = held_out(judged, trained, unknown, unknown)
    return policy_report(drawn.subject(n), prompts, drawn.evidence(judged, n, **more))


def sampled(seed, prompts=40, draws=16, logged=16):
    rng = np.random.default_rng(seed)
    return drawn.categorical(rng, REWARDS, POLICY, REFERENCE, prompts=prompts, draws=draws, logged=logged)


def half_ties(first_K, second_K):
    """P(reward of the first > of the second) + half the ties, over all pairs of outcomes."""
    beats_KK = (REWARDS[:, None] > REWARDS) + (REWARDS[:, None] == REWARDS) / 2
    return float(first_K @ beats_KK @ second_K)


def log_quantile(law_K, num_draws):
    """The num_draws-term series of log p_mid, which the estimator's mean is: −Σ (1 − p)^j / j."""
    p_K = np.array([REFERENCE[r > REWARDS].sum() + REFERENCE[r == REWARDS].sum() / 2 for r in REWARDS])
    return float(law_K @ -sum((1 - p_K) ** j / j for j in range(1, num_draws + 1)))


def opinion_of(judged, value=lambda reward: 10.0 - reward):
    def of(side):
        return [[value(one.reward) for one in getattr(row, side)] for row in judged]

    return Opinion(SECOND, of("policy"), of("reference"))


def facts(report):
    """(interval of the report, the exact number) of everything that can be enumerated."""
    best = best_of_n_law(REFERENCE, REWARDS, N)
    gain, most = (law @ REWARDS - REFERENCE @ REWARDS for law in (POLICY, best))
    yield report.reward.policy, POLICY @ REWARDS
    yield report.reward.reference, REFERENCE @ REWARDS
    yield report.reward.best_of_n, best @ REWARDS
    yield report.reward.gain, gain
    yield report.reward.gain_share, gain / most
    yield report.judge.policy, 10 - POLICY @ REWARDS
    yield report.judge.best_of_n, 10 - best @ REWARDS
    yield report.judge.gain, -gain
    yield report.win_rate_reference, half_ties(POLICY, REFERENCE)
    yield report.win_rate_best_of_n, half_ties(POLICY, best)
    yield report.log_quantile.policy, log_quantile(POLICY, 32)
    yield report.log_quantile.reference, log_quantile(REFERENCE, 31)
    for point in report.frontier[1:4]:
        yield point.reward, best_of_n_law(REFERENCE, REWARDS, point.k) @ REWARDS
        yield point.win_rate, win_rate_best_of_n(REFERENCE, REWARDS, point.k)


def test_every_number_is_the_exact_one_within_its_interval_as_often_as_it_says():
    """Six reports, each with 12 numbers and three points of a frontier: of all .95 are expected to hold it."""
    held = []
    for seed in range(6):
        judged = sampled(seed)
        held += [drawn.holds(*fact) for fact in facts(report_of(judged, opinion=opinion_of(judged)))]
    assert len(held) == 6 * (12 + 2 * 3)
    assert np.mean(held) > 0.88


def test_the_frontier_is_tie_aware_and_ends_before_the_draws_do():
    report = report_of(sampled(0, prompts=60))
    assert [point.k for point in report.frontier] == [*range(1, 17), 19, 23, 27, 31]  # 32 draws, one to win against
    for point in report.frontier[1:16]:
        exact_law = best_of_n_law(REFERENCE, REWARDS, point.k)
        assert point.reward.mean == pytest.approx(exact_law @ REWARDS, abs=0.05)
        assert point.win_rate.mean == pytest.approx(win_rate_best_of_n(REFERENCE, REWARDS, point.k), abs=0.02)
        exact = kl_best_of_n_reference(REFERENCE, REWARDS, point.k)
        assert exact - 0.03 < point.kl < point.kl_bound == pytest.approx(kl_bound(point.k))
    assert (report.frontier[0].win_rate.mean, report.frontier[0].kl) == (pytest.approx(0.5), pytest.approx(0.0))


def test_the_kl_ratio_is_one_for_best_of_n_itself_and_two_for_twice_its_kl():
    """The policy is best-of-3 of the reference, and its KL is what the frontier's is there, or twice that."""
    rng = np.random.default_rng(0)
    reference = [rng.normal(size=48) for _ in range(50)]
    rows = [
        drawn.row(number, rng.normal(size=(16, 3)).max(axis=1).tolist(), own[:16].tolist(), own[16:].tolist())
        for number, own in enumerate(reference)
    ]
    for times in (1, 2):
        stands = report_of(rows, kl=[times * kl_bound(3)] * 50).standing
        assert stands.note == ""
        assert drawn.holds(stands.frontier_kl, kl_bound(3))
        assert drawn.holds(stands.kl_ratio, times)


def test_a_policy_beyond_the_frontiers_end_has_no_ratio_and_the_report_says_so():
    rows = [drawn.row(i, [9.0] * 4, [float(i % 2), 1.0, 2.0, 3.0]) for i in range(4)]
    stands = report_of(rows).standing
    assert (stands.frontier_kl, stands.kl_ratio) == (None, None)
    assert stands.note == "The policy wins 100.0%, more than best-of-3 (75.0%): the frontier ends there."


def test_what_the_ledger_holds_of_the_reference_counts_beside_the_fresh_draws():
    """Fresh 0, 2 and 2, logged 4 and 7: their mean is 3, and best-of-3 of five is 2 once, 4 thrice, 7 six times."""
    rows = [drawn.row(i, [3.0, 3.0], [0.0, 2.0, 2.0], [4.0, 7.0]) for i in range(3)]
    report = report_of(rows, n=3)
    assert report.held_out.reference_draws == (5, 5)
    assert report.reward.reference.mean == 3.0
    assert report.reward.best_of_n.mean == pytest.approx((2 + 3 * 4 + 6 * 7) / 10)
    assert report.win_rate_reference.mean == pytest.approx(3 / 5)
    assert report.win_rate_best_of_n.mean == pytest.approx(1 / 10)


def test_what_the_reward_model_lost_on_both_sides_alike_favours_neither():
    """The two sides exchanged, every number about them is: also where the one has the worst draw, and a lost one."""
    sides = [
        ([None, 2.0, *[float(j % 5) for j in range(62)]], [3.0, None, *[float(j % 7) - 1 for j in range(62)]])
        for _ in range(3)
    ]
    there, back = (
        report_of([drawn.row(i, pair[one], pair[1 - one]) for i, pair in enumerate(sides)], kl=[0.5] * 3).reward
        for one in (0, 1)
    )
    assert (there.policy, there.reference) == (back.reference, back.policy)
    assert there.gain.mean == pytest.approx(-back.gain.mean)
    same = [drawn.row(i, own, own) for i, (own, _) in enumerate(sides)]
    whole, summary = report_of(same).reward, drawn.evidence(same, N).summary
    assert (whole.gain.mean, whole.gain_share.mean) == (0.0, 0.0)
    assert (summary.reward_gain.mean, summary.gain_share) == (0.0, 0.0)


def test_a_lost_draw_of_the_policy_is_worth_the_worst_of_its_prompt():
    """64 draws of each side: 63 of 9 and one lost, beside 0 and 63 of 1."""
    report = report_of([drawn.row(i, [None] + [9.0] * 63, [0.0] + [1.0] * 63) for i in range(3)])
    assert report.reward.policy.mean == pytest.approx(9 * 63 / 64)


# --- length, cost, words ---------------------------------------------------------------------------------


def test_lengths_and_cost_by_hand():
    """The policy's answers have 2 and 4 tokens, the reference's 2, 6, 2 and 6 of which the longer ones are better."""

    def rows():
        for number in range(3):
            own = [drawn.rollout(1.0, tokens=tokens) for tokens in (2, 4, 2, 4)]
            reference = [drawn.rollout(float(tokens), tokens=tokens) for tokens in (2, 6, 2, 6)]
            yield drawn.row(number, own, reference)

    report = report_of(list(rows()), n=2)
    lengths, cost = report.lengths, report.cost
    assert [lengths.policy.mean, lengths.reference.mean, lengths.difference.mean] == [3, 4, -1]
    # Of the six ways to pick two of four, one has only short ones.
    assert lengths.best_of_n.mean == pytest.approx((2 + 5 * 6) / 6)
    assert (lengths.p90_policy, lengths.p90_reference) == (4, 6)
    assert (cost.generated_policy, cost.generated_best_of_n, cost.cheaper) == (3, 8, pytest.approx(8 / 3))
    assert cost.scored_best_of_n == 2 * (2 + 4)  # a prompt of two tokens


def test_finish_reasons_refusals_and_distinct_tokens():
    own = [drawn.rollout(1.0, text="I can't help with that."), drawn.rollout(0.0, tokens=6, finish_reason="length")]
    report = report_of([drawn.row(i, own, [drawn.rollout(0.5, text="...")] * 3) for i in range(3)], n=2)
    assert report.finish_reasons_policy == {"length": 0.5, "stop": 0.5}
    assert (report.refusals_policy.share.mean, report.refusals_policy.judged) == (0.5, 6)
    assert (report.refusals_reference.share, report.refusals_reference.unjudged) == (None, 9)
    # 5 1 and 5 5 5 5 5 1: of eight tokens two are different, of six bigrams two.
    assert [sides.policy.mean for sides in report.distinct[:2]] == [2 / 8, 2 / 6]


def test_empty_completions_have_no_words_no_cost_and_no_error():
    empty = [drawn.rollout(0.0, tokens=0, text="", finish_reason="stop")] * 3
    report = report_of([drawn.row(i, empty, empty) for i in range(3)], n=2)
    assert [(sides.policy, sides.reference) for sides in report.distinct] == [(None, None)] * 3
    assert (report.lengths.policy.mean, report.cost.cheaper, report.refusals_policy.share) == (0.0, None, None)


# --- nothing to tell apart -------------------------------------------------------------------------------


def test_where_all_rewards_tie_everything_is_a_half_and_nothing_is_divided():
    report = report_of([drawn.row(i, [1.0] * 4, [1.0] * 4, [1.0] * 4) for i in range(3)])
    assert (report.win_rate_reference.mean, report.win_rate_best_of_n.mean) == (0.5, 0.5)
    assert report.reward.gain_share is None
    assert all((point.win_rate.mean, point.kl) == (pytest.approx(0.5), pytest.approx(0.0)) for point in report.frontier)
    assert report.standing.kl_ratio is None
    assert "costs no KL" in report.standing.note


def test_one_prompt_is_no_sample_of_prompts():
    with pytest.raises(ValueError, match="at least two, got 1"):
        report_of([drawn.row(0, [1.0] * 4, [0.0] * 4)])


def test_two_prompts_are_few_and_give_wide_intervals():
    report = report_of([drawn.row(0, [1.0] * 4, [0.0] * 4), drawn.row(1, [0.5] * 4, [0.25] * 4)])
    assert report.reward.gain.high - report.reward.gain.low > 5
    assert math.isfinite(report.reward.gain.high)


# --- the second reward model -----------------------------------------------------------------------------


def test_without_a_second_reward_model_the_report_says_so_in_words():
    report = report_of(sampled(0, prompts=3))
    assert (report.judge, report.judge_note) == (None, NOT_CONFIGURED)
    assert all(point.judge is None for point in report.frontier)


def test_its_curve_is_of_what_the_first_one_chose_and_of_the_fresh_draws_alone():
    """It likes the opposite: the harder the first one chooses, the lower it says."""
    judged = sampled(1, logged=8)
    report = report_of(judged, opinion=opinion_of(judged))
    said = [point.judge for point in report.frontier]
    assert [judge is not None for judge in said] == [point.k <= 16 for point in report.frontier]
    means = [judge.mean for judge in said if judge is not None]
    assert means == sorted(means, reverse=True)


def test_what_it_could_not_score_is_left_out_and_said():
    """Of one prompt nothing of the policy; of another one draw that best-of-4 of four would have served."""
    rows = [drawn.row(i, [1.0] * 4, [0.0, 1.0, 2.0, 3.0]) for i in range(5)]
    said = opinion_of(rows, float)
    said.policy[0][:] = [None] * 4
    said.reference[1][3] = None
    report = report_of(rows, opinion=said)
    assert report.judge_note == "2 prompts are left out: it could not score them."
    assert report.judge.best_of_n.mean == 3.0
    nothing = Opinion(SECOND, [[None] * 4 for _ in rows], said.reference)
    assert report_of(rows, opinion=nothing).judge is None
    gone = NoOpinion("The second reward model did not answer.")
    assert report_of(rows, opinion=gone).judge_note == gone.why


# --- unseen ----------------------------------------------------------------------------------------------


def test_a_leak_would_be_counted():
    judged = sampled(0, prompts=4)
    seen = report_of(judged, trained={(0, 2), (0, 3), (0, 77)}).held_out
    assert (seen.prompts, seen.seen_in_training, seen.trained_prompts) == (4, 2, 3)
    assert report_of(judged, trained={(0, 77)}).held_out.seen_in_training == 0


def test_the_record_survives_its_own_json():
    judged = sampled(3, prompts=5)
    report = report_of(judged, opinion=opinion_of(judged))
    assert type(report).model_validate_json(report.model_dump_json()) == report
    assert report.base_policy_id == world.BASE


def test_what_was_cut_off_is_on_the_frontier_as_it_is_served():
    """Of the pairs of three draws, of which the best was cut off, best-of-2 is worth 1, 1 and 0."""
    pool = [drawn.rollout(9.0, finish_reason="length"), drawn.rollout(1.0), drawn.rollout(0.0)]
    curve = Curve.of([drawn.row(number, [0.0], pool) for number in range(2)], 2)
    assert curve.sizes == (1, 2)
    assert curve.reward == pytest.approx(np.array([[10 / 3, 2 / 3]] * 2))
