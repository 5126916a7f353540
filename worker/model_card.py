"""A report as a model card: Markdown for people, with the front matter that Hugging Face reads.

Owns the words and what of the report they show. Does not own any number. Nothing of it names a person, a prompt or a
machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from huggingface_hub import EvalResult, ModelCardData

from bon_algos.contracts import FrontierPoint, HeldOut, Interval, PolicyReport, Refusals, Rewards

HELD_OUT = "held-out prompts of the route"


def model_card(report: PolicyReport) -> str:
    """The whole text."""
    return "\n".join((f"---\n{_front_matter(report)}\n---\n", *_text(report)))


def _front_matter(report: PolicyReport) -> str:
    """YAML. The metrics stand in it as a model-index."""
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name=f"{HELD_OUT} {report.route}",
            metric_type=metric,
            metric_name=name,
            metric_value=round(value, 6),
        )
        for metric, name, value in _metrics(report)
    ]
    return ModelCardData(
        base_model=report.base_policy_id,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "best-of-n", "distillation", report.method],
        model_name=report.policy_id,
        eval_results=results,
    ).to_yaml()


def _metrics(report: PolicyReport) -> Iterator[tuple[str, str, float]]:
    yield "reward", "Reward", report.reward.policy.mean
    if report.judge is not None:
        yield "second_reward", "Reward by a model that neither chose nor trained", report.judge.policy.mean
    yield "win_rate", "Win rate against the reference", report.win_rate_reference.mean
    yield "win_rate_best_of_n", f"Win rate against best-of-{report.n} of the reference", report.win_rate_best_of_n.mean
    yield "kl", "KL to the reference, nats per completion", report.kl_policy_reference.mean


def _text(report: PolicyReport) -> Iterator[str]:
    n, cost = report.n, report.cost
    yield f"# {report.policy_id}\n"
    yield (
        f"A LoRA adapter for `{report.base_policy_id}`, distilled by `{report.method}` from best-of-{n} of the route "
        f"`{report.route}`, so that one sample stands in for the best of {n}. All numbers are from prompts that were "
        "held out; the record with every digit is `report.json`.\n"
    )
    if report.reference_policy_id not in (None, report.base_policy_id):
        yield f"The reference is `{report.reference_policy_id}`, which it was trained further from.\n"
    yield "![Win rate and reward against KL, and the n-curve](report.png)\n"
    yield "## What it is worth\n"
    yield from _table(("", "policy, one sample", "reference, one sample", f"best-of-{n}"), _quality(report))
    yield (
        f"\nThe policy gains {_text_of(report.reward.gain)} of reward over one sample of the reference"
        f"{_share(report.reward, n)}. Against best-of-{n} it wins {_percent(report.win_rate_best_of_n)} %, half the "
        "ties.\n"
    )
    yield f"{_judge(report)}\n"
    yield "## What it costs\n"
    times = "" if cost.cheaper is None else f": {cost.cheaper:.1f} times as many"
    yield (
        f"One answer takes {cost.generated_policy:.1f} generated tokens; best-of-{n} takes "
        f"{cost.generated_best_of_n:.1f}{times}, and its reward model reads {cost.scored_best_of_n:.0f} tokens to "
        "choose (counted in the policy's tokens, prompts included; a prompt is computed once, whatever n is).\n"
    )
    yield f"{_standing(report)}\n"
    yield "## The best-of-k frontier of the reference\n"
    yield from _table(("k", "reward", "win rate, %", "KL, nats", "KL bound", "second reward"), _frontier(report))
    yield "\n## What else changed\n"
    yield from _table(("", "policy", "reference"), _drift(report))
    yield f"\n{_refusals(report)}\n"
    yield "## How this was measured\n"
    yield from _method(report)


def _quality(report: PolicyReport) -> Iterator[tuple[str, ...]]:
    def row(name: str, rewards: Rewards) -> tuple[str, ...]:
        return name, *map(_text_of, (rewards.policy, rewards.reference, rewards.best_of_n))

    by_k = {point.k: point for point in report.frontier}
    best = by_k.get(report.n)
    yield row("reward", report.reward)
    if report.judge is not None:
        yield row("reward by the second model", report.judge)
    win = "–" if best is None else _percent(best.win_rate)
    yield "win rate against the reference, %", _percent(report.win_rate_reference), "50", win
    kl = "–" if best is None else f"{best.kl:.3f} (at most {best.kl_bound:.3f})"
    yield "KL to the reference, nats", _text_of(report.kl_policy_reference), "0", kl
    if report.kl_policy_base is not None:
        yield "KL to the base, nats", _text_of(report.kl_policy_base), "–", "–"
    quantile = report.log_quantile
    yield (
        "mean log-quantile",
        _text_of(quantile.policy),
        _text_of(quantile.reference),
        f"{-1 / report.n:.3f} without ties",
    )
    lengths = report.lengths
    yield "tokens of the answer", *map(_tokens, (lengths.policy, lengths.reference, lengths.best_of_n))


def _share(rewards: Rewards, n: int) -> str:
    return "" if rewards.gain_share is None else f", {_percent(rewards.gain_share)} % of what best-of-{n} gains"


def _judge(report: PolicyReport) -> str:
    if report.judge is None:
        return report.judge_note
    said = (
        f"A second reward model, `{report.judge.reward_model_id}`, which neither chose nor trained, sees a gain of "
        f"{_text_of(report.judge.gain)}{_share(report.judge, report.n)}."
    )
    return f"{said} {report.judge_note}".rstrip()


def _standing(report: PolicyReport) -> str:
    stands = report.standing
    if stands.kl_ratio is None or stands.frontier_kl is None:
        return f"No KL ratio to the frontier: {stands.note}"
    return (
        f"At its win rate best-of-k would cost {_text_of(stands.frontier_kl)} nats of KL; the policy spends "
        f"{_text_of(stands.kl_ratio)} times as much."
    )


def _frontier(report: PolicyReport) -> Iterator[tuple[str, ...]]:
    shown = {report.n, report.frontier[-1].k} | {2**power for power in range(13)}
    for point in report.frontier:
        if point.k in shown:
            yield _point(point)


def _point(point: FrontierPoint) -> tuple[str, ...]:
    numbers = (_text_of(point.reward), _percent(point.win_rate), f"{point.kl:.3f}", f"{point.kl_bound:.3f}")
    return str(point.k), *numbers, _text_of(point.judge)


def _drift(report: PolicyReport) -> Iterator[tuple[str, ...]]:
    lengths = report.lengths
    yield "tokens, mean", _tokens(lengths.policy), _tokens(lengths.reference)
    yield "tokens, 90th percentile", f"{lengths.p90_policy:.0f}", f"{lengths.p90_reference:.0f}"
    yield "tokens, paired difference", _tokens(lengths.difference), "–"
    for n, sides in enumerate(report.distinct, start=1):
        yield f"distinct-{n}", _text_of(sides.policy), _text_of(sides.reference)
    yield "ended by", _shares(report.finish_reasons_policy), _shares(report.finish_reasons_reference)
    yield "refusals, %", _refused(report.refusals_policy), _refused(report.refusals_reference)


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{reason} {100 * share:.1f} %" for reason, share in shares.items())


def _refused(refusals: Refusals) -> str:
    return "–" if refusals.share is None else _percent(refusals.share)


def _refusals(report: PolicyReport) -> str:
    unknown = report.refusals_policy.unjudged + report.refusals_reference.unjudged
    total = unknown + report.refusals_policy.judged + report.refusals_reference.judged
    return (
        "Distinct-n: of a prompt's token n-grams the share that are different. Refusals: a few English phrases in the "
        f"first sentence, a lower bound; of {unknown} of {total} completions nothing is said, because they are too "
        "short or not in English."
    )


def _method(report: PolicyReport) -> Iterator[str]:
    fewest, most = report.held_out.reference_draws
    draws = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    yield (
        f"- {report.held_out.prompts} held-out prompts, {report.held_out.samples_per_prompt} fresh samples of the "
        f"policy and of the reference for each; with the ledger's own, {draws} draws of the reference."
    )
    yield f"- {_unseen(report.held_out)}"
    yield f"- Intervals: {report.intervals}"
    yield (
        "- The frontier is exact for these draws: best-of-k averaged over all ways to pick k of them, ties shared. Its "
        "KL is an estimate that knows of ties; the bound is log k − (k − 1)/k. KL of the policy: log-ratio on its own "
        "samples, so it may come out below 0 where it is near it."
    )
    yield (
        f"- Chosen and trained by reward model `{report.reward.reward_model_id}`, job `{report.job_id}`, seed "
        f"{report.seed}, parent `{report.parent_policy_id}`."
    )


def _unseen(held_out: HeldOut) -> str:
    ancestors = (
        f" and of its ancestors {', '.join(f'`{one}`' for one in held_out.ancestors)}" if held_out.ancestors else ""
    )
    return (
        f"{held_out.seen_in_training} of them are among the {held_out.trained_prompts} prompts of this policy's "
        f"training{ancestors}, compared token by token.{_unknown(held_out.unknown_ancestors)}"
    )


def _unknown(ancestors: tuple[str, ...]) -> str:
    if not ancestors:
        return ""
    named = ", ".join(f"`{one}`" for one in ancestors)
    return f" What {named} learned from is not known here: some of these prompts may be among it."


# --- cells -----------------------------------------------------------------------------------------------


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|---|{'---:|' * (len(head) - 1)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _text_of(interval: Interval | None, unit: float = 1.0, digits: int = 3) -> str:
    """`1.84 (1.79 to 1.89)`."""
    if interval is None:
        return "–"
    mean, low, high = (f"{unit * number:.{digits}f}" for number in (interval.mean, interval.low, interval.high))
    return f"{mean} ({low} to {high})"


def _tokens(interval: Interval) -> str:
    return _text_of(interval, digits=1)


def _percent(share: Interval) -> str:
    return _text_of(share, unit=100, digits=1)
