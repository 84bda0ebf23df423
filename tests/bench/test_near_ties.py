import pytest

from bench.client import Choices
from bench.near_ties import first_difference, gap_noise


def choices(tokens: list[int], gaps: list[float]) -> Choices:
    pairs = zip(tokens, gaps, strict=True)
    return Choices(tuple(tokens), tuple(((t, -0.5), (t + 1, -0.5 - gap)) for t, gap in pairs))


def test_the_noise_is_the_largest_change_of_the_gap():
    alone, together = choices([1, 2, 3], [1.0, 2.0, 3.0]), choices([1, 2, 3], [1.1, 1.8, 3.0])
    assert gap_noise([alone], [together]) == pytest.approx(0.2)


def test_positions_after_a_difference_have_another_context_and_do_not_count():
    alone, together = choices([1, 2, 3], [1.0, 0.1, 3.0]), choices([1, 9, 3], [1.0, 0.2, 9.0])
    assert gap_noise([alone], [together]) == pytest.approx(0.1)


def test_the_first_difference_of_equal_answers_is_none():
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1, 3]) == 1
