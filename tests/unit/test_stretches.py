"""Who decodes which latent frames, and who computes what."""

import pytest

from vidgen.core.errors import InputError
from vidgen.pipeline.crew_link import Division, divide
from vidgen.pipeline.stretches import BUFFER_BYTES, next_stretches


@pytest.mark.parametrize("begin", [0, 3, 40])
@pytest.mark.parametrize("count", [1, 2, 9, 21, 100])
@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("look_back", [1, 5])
def test_stretches_lie_behind_each_other_and_take_equally_long(begin, count, ranks, look_back):
    stretches = next_stretches(begin, begin + count, ranks, look_back, 1)
    assert [first for first, _ in stretches] == [begin, *(end for _, end in stretches[:-1])]
    assert stretches[-1][1] == begin + count
    costs = [end - first + min(first, look_back) for first, end in stretches if end > first]
    assert max(costs) <= count + min(begin, look_back)
    assert max(costs[:-1], default=0) - min(costs[:-1], default=0) <= 1


def test_a_round_holds_no_more_than_the_buffer():
    stretches = next_stretches(0, 1000, 4, 3, BUFFER_BYTES // 10)
    assert max(end - first for first, end in stretches) == 10
    assert next_stretches(0, 9, 2, 3, 10 * BUFFER_BYTES)[-1][1] == 6, "never none at all"


def test_guidance_is_divided_first():
    assert divide(2, 12, guided=True) == Division(2, 1)
    assert divide(2, 12, guided=False) == Division(1, 2)
    assert divide(4, 12, guided=True) == Division(2, 2)
    assert divide(3, 12, guided=True) == Division(1, 3)
    with pytest.raises(InputError, match="give at most 2 devices, 4 with guidance"):
        divide(8, 2, guided=True)


def test_each_rank_computes_its_own_branch():
    both, alone = Division(2, 2), Division(1, 4)
    assert [both.turns((0,), rank, shard=False) for rank in range(4)] == [[0], [0], [], []]
    assert [both.turns((0, 1), rank, shard=False) for rank in range(4)] == [[0]] * 4
    assert [both.turns((0,), rank, shard=True) for rank in range(4)] == [[0]] * 4
    assert alone.turns((1,), 3, shard=False) == [1]
    assert [both.contexts(["a", "b"], rank) for rank in (0, 3)] == [["a"], ["b"]]
