"""Cases that are no repeats: every pair of values, and every case where there are no further parameters."""

from __future__ import annotations

import itertools

from pairs import covering


def test_every_pair_is_there_in_fewer_cases():
    cases = [list(zip("abcd", values, strict=True)) for values in itertools.product(range(3), range(5), "xy", [None])]
    chosen = [cases[i] for i in covering(cases)]
    pairs, found = ({p for case in some for p in itertools.combinations(case, 2)} for some in (cases, chosen))
    assert found == pairs and len(chosen) == 15 and len(cases) == 30


def test_cases_of_one_or_two_parameters_all_stay():
    for sizes in ([4], [4, 3]):
        cases = [list(enumerate(values)) for values in itertools.product(*map(range, sizes))]
        assert covering(cases) == set(range(len(cases)))
