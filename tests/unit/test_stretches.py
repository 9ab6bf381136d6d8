"""Who decodes which latent frames, and who computes what."""

import pytest

from vidgen.core.errors import InputError
from vidgen.pipeline import codec
from vidgen.pipeline.codec import room_for
from vidgen.pipeline.parallel.ipc import Division, divide, stretches


@pytest.mark.parametrize("begin", [0, 3, 40])
@pytest.mark.parametrize("count", [1, 2, 9, 21, 100])
@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("look_back", [1, 5])
def test_stretches_lie_one_after_another_and_take_equally_long(begin, count, ranks, look_back):
    found = stretches(begin, begin + count, ranks, look_back)
    assert [first for first, _ in found] == [begin, *(end for _, end in found[:-1])]
    assert found[-1][1] == begin + count
    costs = [end - first + min(first, look_back) for first, end in found if end > first]
    assert max(costs) <= count + min(begin, look_back)
    assert max(costs[:-1], default=0) - min(costs[:-1], default=0) <= 1


def test_what_is_long_is_shared_and_what_is_short_is_not():
    assert stretches(0, 21, 2, 38) == [(0, 21), (21, 21)]
    assert stretches(0, 1000, 2, 38) == [(0, 519), (519, 1000)]


def test_room_is_the_same_in_a_file(monkeypatch):
    monkeypatch.setattr(codec, "IN_MEMORY", 10)
    for count in (10, 11):
        room = room_for(count)
        room[-1] = 7
        assert room.tolist() == [0] * (count - 1) + [7]


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
