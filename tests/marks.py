"""Which cases of a table the quick run takes."""

import pytest


def quick(cases, *chosen):
    """The cases as parameters: slow, but for those that are one of `chosen`, or tuples that begin with one."""
    each = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=() if case[0] in chosen else pytest.mark.slow) for case in each]
