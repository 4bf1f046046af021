"""Tables of which neither rows nor columns need divide by ranks, drawn by hypothesis."""

import pytest
from ranks import run_ranks
from torch import distributed

pytestmark = pytest.mark.slow


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize(("ranks", "cases"), [(2, 60), (4, 60)])
def test_tables_of_any_size(tmp_path, ranks, cases):
    call = f"any_size_ranks.run_any_size(rank, ranks, {cases})"
    run_ranks(f"import any_size_ranks\n{call}", tmp_path, ranks)
