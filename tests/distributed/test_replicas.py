"""Tables on every rank."""

import pytest
from ranks import run_two_ranks
from torch import distributed

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")


def test_parameters_made_later_are_averaged_too(tmp_path):
    run_two_ranks("import replica_ranks\nreplica_ranks.run(rank, ranks)", tmp_path)
