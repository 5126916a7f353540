"""A benchmark's verdict can be read on a terminal of 80 columns, however long the name of a claim is."""

from io import StringIO

from rich.console import Console

from benchmarks.claims import at_least, at_most, finish, table


def test_a_long_name_is_folded_and_no_number_or_verdict_is_cut_off() -> None:
    shown = StringIO()
    sentence = "distance of the mean: taken as the reference's less by the mixture of both policies, upper bound of all"
    status = finish([at_most(sentence, 0.7125, 1), at_least("rate", 2.5, 3)], None, {}, Console(file=shown, width=80))
    printed = " ".join(shown.getvalue().split())
    assert status == 1
    assert "0.7125 ≤ 1 yes" in printed
    assert "rate 2.5 ≥ 3 NO" in printed
    assert all(word in printed for word in sentence.split())


def test_in_a_narrow_terminal_an_interval_stays_on_its_line_beside_a_folded_sentence() -> None:
    shown = StringIO()
    rows = [(f"separate rows, head in chunks, reference pass, shape {n}", "5599", "1.05 (1.02–1.08)") for n in range(2)]
    Console(file=shown, width=80).print(table("Steps", ("step", "CPU ms", "times a trainer of trl"), rows))
    lines = shown.getvalue().splitlines()
    assert sum("1.05 (1.02–1.08)" in line and "5599" in line for line in lines) == 2
    assert max(map(len, lines)) <= 80


def test_a_wide_table_folds_its_first_column_and_its_headings_only() -> None:
    shown = StringIO()
    columns = ("step", "CPU ms", "× GRPO", "× DPO", "peak MiB")
    rows = [("prompt shared, reference from the ledger", "1177", "5.02 (4.82–5.22)", "5.13 (4.90–5.36)", "348")] * 2
    Console(file=shown, width=80).print(table("Steps", columns, rows))
    assert shown.getvalue().count("5.02 (4.82–5.22)  5.13 (4.90–5.36)       348") == 2
