"""From completions to scores: the id of a reward model, what its members are asked, one score from several."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from bon_algos.chat import ChatTokenizer
from bon_algos.contracts import HttpMember, Message, RewardConfig, VllmMember
from bon_algos.scoring import (
    SEQUENCES_PER_CALL,
    Completion,
    HttpReader,
    Score,
    VllmReader,
    combined,
    open_readers,
    template_digest_of,
)
from tests.stubs.tokenizer import TEMPLATE, byte_tokenizer

ID = "rm-" + "a" * 16


def http(model="judge", **more):
    return HttpMember(url="unix:///judge.sock", model=model, **more)


def vllm(model=ID, window=16, **more):
    return VllmMember(url="unix:///rm.sock", model=model, directory="/rm", window=window, **more)


def tokenizer(template=TEMPLATE):
    return ChatTokenizer(byte_tokenizer().to_str(), {"chat_template": template})


def scores(*rewards):
    return [Score(reward) for reward in rewards]


# --- which reward model it is --------------------------------------------------------------------------------


def test_a_name_that_is_an_id_is_the_id_and_any_other_name_has_one():
    assert RewardConfig(members=(vllm(ID),)).id == ID
    assert RewardConfig(members=(http("judge"),)).id == RewardConfig(members=(vllm("judge"),)).id
    assert RewardConfig(members=(http("judge"),)).id.startswith("rm-")


def test_whatever_changes_a_reward_changes_the_id_and_where_it_answers_does_not():
    a, b = http("a"), http("b")
    configs = [
        RewardConfig(members=(a,)),
        RewardConfig(members=(http("a", scale=2.0),)),
        RewardConfig(members=(b,)),
        RewardConfig(members=(a, b)),
        RewardConfig(members=(a, http("b", scale=2.0))),
        RewardConfig(members=(a, b), caution=0.5),
        RewardConfig(members=(a, b, http("c"))),
    ]
    assert len({config.id for config in configs}) == len(configs)
    moved = HttpMember(url="http://127.0.0.1:9000", model="a", path="/rewards")
    assert RewardConfig(members=(moved,)).id == configs[0].id
    # A mean does not care who comes first.
    assert RewardConfig(members=(b, a)).id == configs[3].id


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"members": []}, "at least 1"),
        ({"members": [http("a"), http("a")]}, "named twice"),
        ({"members": [http("a")], "caution": 0.5}, "two members or more"),
        ({"members": [http("a"), http("b")], "caution": -0.5}, "greater than or equal to 0"),
        ({"members": [{"kind": "http", "url": "unix:///a", "model": "a", "scale": 0}]}, "greater than 0"),
        ({"members": [{"kind": "http", "url": "unix:///a", "model": ""}]}, "at least 1 character"),
        ({"members": [{"kind": "http", "url": "unix:///a", "model": "a", "window": 4}]}, "not permitted"),
        ({"members": [{"kind": "http", "url": "unix:///a", "model": "a", "path": "score"}]}, "pattern"),
        ({"members": [{"kind": "pickle", "url": "unix:///a", "model": "a"}]}, "kind"),
        ({"members": [{"kind": "vllm", "url": "unix:///a", "model": "a", "window": 4}]}, "directory"),
    ],
)
def test_a_reward_model_that_is_none_is_refused_in_words(changes, words):
    with pytest.raises(ValidationError, match=words):
        RewardConfig.model_validate(changes)


@pytest.mark.parametrize(
    "url", ["http://10.0.0.7:80", "https://127.0.0.1:1", "http://judge:80", "unix://a/b", "http://127.0.0.1"]
)
def test_a_member_on_a_network_is_refused(url):
    with pytest.raises(ValidationError, match="never over a network"):
        HttpMember(url=url, model="a")


# --- what a member is asked -----------------------------------------------------------------------------------


def test_a_classifier_reads_its_own_template_and_what_is_too_long_is_not_sent():
    """`u:hi\\na:` is 7 tokens and the closing newline one: 8 letters fit a window of 16, 9 do not."""
    reader = VllmReader(vllm(window=16), tokenizer())
    asked = reader.ask([Completion("hi", None, "x" * 8), Completion("hi", None, "x" * 9), Completion("hi", None, "")])
    [call] = asked.calls
    assert call.body["input"] == ["u:hi\na:" + "x" * 8 + "\n", "u:hi\na:\n"]
    assert call.path == "/classify"
    assert list(call.places) == [0, 2]
    assert asked.scores[1] == Score(None, "too_long")
    answer = b'{"data": [{"index": 1, "probs": [2.0]}, {"index": 0, "probs": [NaN]}]}'
    assert call.read(answer) == [Score(None, "reward_not_finite"), Score(2.0)]


@pytest.mark.parametrize(
    ("prompt", "text", "answer"),
    [
        ("p", "<think>so</think>\n\nit is", "it is"),
        ("p", "\n<think>so</think>it is </think>", "it is </think>"),
        ("p<think>\n", "so</think>it is", "it is"),
        ("p<think>", "so", ""),
        ("p", "<think>so", ""),
        ("p", "it is <think>so</think>", "it is <think>so</think>"),
        ("p<think> ha", "it</think>is", "it</think>is"),
    ],
)
def test_what_is_judged_is_the_answer_behind_the_reasoning(prompt, text, answer):
    completion = Completion(prompt, None, text)
    [told] = HttpReader(http("judge")).ask([completion]).calls
    assert told.body["completions"] == [answer]
    [asked] = VllmReader(vllm(window=64), tokenizer()).ask([completion]).calls
    assert asked.body["input"] == [f"u:{prompt}\na:{answer}\n"]


def test_the_engine_adds_special_tokens_only_where_no_template_has_written_them():
    plain = VllmReader(vllm(), tokenizer(None)).ask([Completion("p", None, "x")]).calls[0].body
    chat = VllmReader(vllm(), tokenizer()).ask([Completion("p", None, "x")]).calls[0].body
    assert (plain["add_special_tokens"], chat["add_special_tokens"]) == (True, False)


def test_a_conversation_that_the_template_refuses_has_no_reward():
    refusing = tokenizer("{% if messages|length > 2 %}{{ raise_exception('two turns at most') }}{% endif %}x")
    turns = [Message(role="user", content="a"), Message(role="assistant", content="b")]
    reader = VllmReader(vllm(), refusing)
    asked = reader.ask([Completion("p", turns, "x"), Completion("p", turns[:1], "x")])
    assert asked.scores[0] == Score(None, "reward_error", reason="two turns at most")
    assert list(asked.calls[0].places) == [1]
    assert reader.refusal("p", turns) == "the reward model's chat template refuses messages: two turns at most"


def test_many_completions_are_asked_about_in_calls_of_bounded_size():
    asked = VllmReader(vllm(), tokenizer()).ask([Completion("p", None, "x")] * (SEQUENCES_PER_CALL + 1))
    assert [len(call.places) for call in asked.calls] == [SEQUENCES_PER_CALL, 1]


def test_a_prompt_without_room_for_any_completion_is_refused():
    """`u:` + prompt + newline + `a:` + newline: 6 tokens beside the prompt's."""
    reader = VllmReader(vllm(window=16), tokenizer())
    assert reader.refusal("x" * 9, None) is None
    assert reader.refusal("x" * 10, None) == "prompt takes 16 tokens of the reward model's window of 16"
    assert HttpReader(http()).refusal("x" * 10**6, None) is None


def test_a_program_is_asked_once_for_each_prompt():
    turns = (Message(role="user", content="hi"),)
    prompts = [("a", None), ("a", None), ("a", turns), ("b", turns)]
    asked = HttpReader(http()).ask([Completion(*prompt, str(place)) for place, prompt in enumerate(prompts)])
    bodies = [(call.body["prompt"], call.body["messages"] is None, call.body["completions"]) for call in asked.calls]
    assert bodies == [("a", True, ["0", "1"]), ("a", False, ["2"]), ("b", False, ["3"])]
    assert [list(call.places) for call in asked.calls] == [[0, 1], [2], [3]]
    answer = b'{"rewards": [null, Infinity], "reasons": ["too vague", null]}'
    assert asked.calls[0].read(answer) == [
        Score(None, "reward_error", reason="too vague"),
        Score(None, "reward_not_finite"),
    ]


def test_groups_read_in_different_ways_have_different_digests():
    def digest(*members, template=TEMPLATE):
        config = RewardConfig(members=members)
        return template_digest_of(open_readers(config, lambda member: tokenizer(template)))

    assert digest(vllm()) == tokenizer().template_digest
    found = {digest(vllm()), digest(vllm(), template="x"), digest(http()), digest(vllm(), http())}
    assert len(found) == 4
    assert digest(vllm(), http(), template="x") not in found


# --- one score from several -----------------------------------------------------------------------------------


def test_an_ensembles_reward_is_the_mean_less_caution_times_the_spread():
    """Rewards 1 and 10·0.5 = 5: mean 3, standard deviation 2; with λ = 0.25 the reward is 3 − 0.5."""
    config = RewardConfig(members=(http("a"), http("b", scale=0.5)), caution=0.25)
    assert combined(config, [scores(1.0, 2.0), scores(10.0, 4.0)]) == [
        Score(2.5, disagreement=2.0),
        Score(2.0, disagreement=0.0),
    ]


def test_caution_prefers_what_all_members_like():
    """(0, 6) and (2.5, 2.5): the mean prefers the first, the mean less one spread of 3 the second."""
    both = [scores(0.0, 2.5), scores(6.0, 2.5)]

    def best(caution):
        first, second = combined(RewardConfig(members=(http("a"), http("b")), caution=caution), both)
        assert first.reward is not None
        assert second.reward is not None
        return int(second.reward > first.reward)

    assert (best(0.0), best(1.0)) == (0, 1)


def test_one_member_does_not_disagree_and_may_be_scaled():
    assert combined(RewardConfig(members=(http("a", scale=3.0),)), [scores(2.0)]) == [Score(6.0)]


def test_what_one_member_has_no_reward_for_has_none():
    config = RewardConfig(members=(http("a"), http("b")))
    found = combined(config, [scores(1.0, 1.0), [Score(2.0), Score(None, "too_long")]])
    assert found == [Score(1.5, disagreement=0.5), Score(None, "too_long")]


@pytest.mark.parametrize("pair", [(1e308, 1e308), (1e308, -1e308)])
def test_a_mean_or_spread_that_no_float_holds_is_no_reward(pair):
    config = RewardConfig(members=(http("a", scale=10.0), http("b", scale=10.0)))
    assert combined(config, [scores(pair[0]), scores(pair[1])]) == [Score(None, "reward_not_finite")]
