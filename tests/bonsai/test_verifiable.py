"""Rewards that can be checked."""

from __future__ import annotations

import pytest

from bonsai.verifiable import exact_answer, final_answer, json_conforms, matches, same_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So 3 + 4 is 7.", "7"),
        ("It is -1,234.5 in all", "-1,234.5"),
        ("half, so 1/2", "1/2"),
        (r"thus \boxed{42}, as 7 · 6 is", "42"),
        (r"first \boxed{1}, then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{never closed 5", "5"),
        ("Paris", "Paris"),
        ("", ""),
    ],
)
def test_what_a_text_comes_to(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1,000", "1000", True),
        ("0.5", "1/2", True),
        ("7.", "7", True),
        ("7.0", "7", True),
        ("$12", "12", True),
        ("-3", "3", False),
        ("  Paris. ", "paris", True),
        ("Paris, France", "Paris", False),
        ("ﬁve", "five", True),
        ("1/0", "1/0", True),
        ("1/0", "2", False),
        ("", "0", False),
        ("1" * 5000, "1" * 5000, True),
    ],
)
def test_which_answers_are_the_same(one, other, same):
    assert same_answer(one, other) is same


def test_an_answer_is_looked_up_by_the_prompt_or_the_last_message(tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text(
        '{"prompt": "6 · 7?", "answer": "42", "source": "a book"}\n{"prompt": "Capital?", "answer": "Paris"}'
    )
    reward = exact_answer(file)
    assert reward("6 · 7?", ["It is 42.", "It is 43.", r"\boxed{42} and not 41", ""]) == [1.0, 0.0, 1.0, 0.0]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Capital?"}]
    assert reward(turns, ["paris", "Lyon"]) == [1.0, 0.0]
    assert reward("unknown", ["a", "b"]) == [None, None]


@pytest.mark.parametrize(
    ("content", "words"),
    [('{"prompt": "a"}', "line 1: Field required"), ('{"prompt": "a", "answer": "b"}\n{', "line 2: Invalid JSON")],
)
def test_a_file_without_answers_is_refused_in_words(tmp_path, content, words):
    (tmp_path / "answers.jsonl").write_text(content)
    with pytest.raises(ValueError, match=words):
        exact_answer(tmp_path / "answers.jsonl")


def test_a_pattern_is_found_or_is_all_of_it():
    assert matches(r"\bcat\b")("p", ["a cat sat", "concatenate", "cat"]) == [1.0, 0.0, 1.0]
    assert matches("yes|no", whole=True)("p", [" yes\n", "yes, no", "maybe"]) == [1.0, 0.0, 0.0]


def test_json_of_a_form():
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}, "required": ["n"]}
    fenced = 'Here:\n```json\n{"n": 0}\n```\nor rather\n```\n{"n": 2}\n```\n'
    given = ['{"n": 1}', '{"n": 0}', '{"n": "1"}', "{}", '{"n": 1', "not JSON", fenced, "[" * 100_000]
    assert json_conforms(schema)("p", given) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0]


def test_a_schema_that_is_none_is_refused():
    with pytest.raises(ValueError, match="no JSON Schema"):
        json_conforms({"type": "number of sorts"})
