"""Generated files: every reader reads or refuses them, without a hang, a crash or a flood of memory."""

import pytest

from tests.fuzzing import READERS, readers
from tests.limited import Outcome, outcomes


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    return dict(zip(READERS, outcomes(readers, tmp_path_factory.mktemp("fuzz")), strict=True))


@pytest.mark.parametrize("reader", READERS)
def test_a_reader_ends_in_content_or_one_line(reader: str, found: dict[str, Outcome]) -> None:
    outcome = found[reader]
    assert outcome.code == 0, outcome.printed[-3000:]
    assert outcome.kept_the_limits, outcome
