"""Say which fold of how many, as in 2/5.

This is apart from the folds themselves, because the settings of a training need it before NumPy is imported.
"""

import re

from poolnet.errors import InputError

MOST = 100


def parse(fold: str) -> tuple[int, int]:
    """Parse "2/5" as the second of five folds; raise `InputError`."""
    match = re.fullmatch(r"([1-9]\d{0,3})/([1-9]\d{0,3})", fold, re.ASCII)
    k, n = map(int, match.groups()) if match else (0, 0)
    if not (1 <= k <= n and 2 <= n <= MOST):
        raise InputError(f"fold: found {fold!r}, expected such as 2/5, the second of five, and {MOST} folds at most")
    return k, n
