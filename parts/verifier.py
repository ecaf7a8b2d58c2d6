"""Who says whether a response is right: parts/answers.py, or a function of your own.

    --verifier FILE:FUNCTION     FUNCTION(response, row) -> a number from 0 to 1, or a bool

`row` is the whole row of the data file, so tests to run or a rubric may stand in it. What raises, or
returns something else, counts as wrong and is counted; that a check ends in time is its own business.
"""

import functools
import importlib.util
import os

from parts.answers import verify
from parts.formats import BadInput


def answer_check(response, row):
    """The project's own: is the response's final answer equal to the row's?"""
    return verify(response, row["answer"])


@functools.lru_cache
def load_verifier(spec):
    """The function that --verifier names; None: answer_check. Raises BadInput."""
    if not spec:
        return answer_check
    path, _, name = spec.rpartition(":")
    if not os.path.isfile(path):
        raise BadInput(f"--verifier {spec}: no such file; wanted FILE:FUNCTION")
    module_spec = importlib.util.spec_from_file_location("verifier", path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        return getattr(module, name)
    except Exception as error:
        raise BadInput(f"--verifier {spec}: {type(error).__name__}: {error}") from None


def check(spec, response, row):
    """-> how right a response to a row's question is, from 0.0 to 1.0; did the verifier fail?"""
    function = load_verifier(spec)
    try:
        number = float(function(response, row.get("row", row) if spec else row))
        if 0 <= number <= 1:
            return number, False
    except Exception:
        pass
    return 0.0, True
