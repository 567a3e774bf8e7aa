"""Which checkpoints are kept: a pure decision, by examples and by what must hold of all."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale import checkpoint
from vitscale.retention import Policy, goodness, remove, superfluous

TEN = dict.fromkeys(range(10, 110, 10), 100)


@pytest.mark.parametrize(
    ("policy", "good", "coming", "kept"),
    [
        (Policy(newest=3), {}, None, [80, 90, 100]),
        (Policy(newest=3), {}, 100, [90, 100]),  # and the one that comes is the third
        (Policy(newest=1), {}, 100, [100]),  # it is not there yet
        (Policy(newest=0), {}, None, [*TEN]),
        (Policy(newest=20), {}, None, [*TEN]),
        (Policy(newest=2, every=40), {}, None, [40, 80, 90, 100]),
        (Policy(newest=2), {20: 0.5, 30: 0.7, 35: 0.9, 90: 0.1}, None, [30, 90, 100]),  # 35 has no checkpoint
        (Policy(newest=2), {20: 0.7, 30: 0.7}, None, [30, 90, 100]),
        (Policy(newest=2, best=False), {30: 0.7}, None, [90, 100]),
        (Policy(newest=0, max_bytes=350), {}, None, [80, 90, 100]),
        (Policy(newest=0, max_bytes=350), {}, 100, [90, 100]),
        (Policy(newest=0, max_bytes=350, every=50), {}, None, [50, 90, 100]),  # what is kept for good goes after the others
        (Policy(newest=4, max_bytes=250, every=50), {10: 0.9}, None, [10, 100]),
        (Policy(newest=4, max_bytes=10), {10: 0.9}, None, [10, 100]),
    ],
)
def test_what_is_kept(policy: Policy, good: dict[int, float], coming: int | None, kept: list[int]) -> None:
    gone = superfluous(TEN, good, policy, coming)
    assert [step for step in TEN if step not in gone] == kept


policies = st.builds(
    Policy, newest=st.integers(0, 12), every=st.integers(0, 60), best=st.booleans(), max_bytes=st.none() | st.integers(0, 2_000)
)


@given(
    st.dictionaries(st.integers(1, 200), st.integers(1, 400), min_size=1, max_size=12),
    st.dictionaries(st.integers(1, 200), st.floats(0, 1), max_size=12),
    policies,
    st.none() | st.integers(1, 400),
)
def test_of_every_policy(sizes: dict[int, int], good: dict[int, float], policy: Policy, coming: int | None) -> None:
    gone = superfluous(sizes, good, policy, coming)
    kept = sizes.keys() - set(gone)
    assert gone == sorted(set(gone))
    assert set(gone) <= sizes.keys()
    assert max(sizes) in kept
    best = max((good[step] for step in sizes.keys() & good.keys()), default=None)
    if policy.best and best is not None:
        assert any(good.get(step) == best for step in kept)
    if policy.max_bytes is None:
        unless_newest = set(sorted(sizes)[-(policy.newest - (coming is not None)) or len(sizes) :]) if policy.newest else set(sizes)
        assert unless_newest <= kept
        assert all(step in kept for step in sizes if policy.every and step % policy.every == 0)
    else:
        fits = sum(sizes[step] for step in kept) + (coming or 0) <= policy.max_bytes
        assert fits or len(kept) <= 1 + policy.best, "only the newest and the best may be over the budget"
    rest = {step: sizes[step] for step in kept}
    assert superfluous(rest, good, policy, coming) == [], "what is kept is kept the next time, too"


def test_goodness_is_of_evaluations_that_found_something() -> None:
    lines = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "eval_top1": 0.5, "eval_loss": 1.0},
        {"step": 3, "eval_top1": None},
        {"step": 4, "eval_top1": float("nan")},
    ]
    assert goodness(lines) == {2: 0.5}


def test_removal_leaves_nothing_that_looks_like_a_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2):
        folder = checkpoint.step_folder(tmp_path, step)
        folder.mkdir(parents=True)
        (folder / "COMMIT.json").write_text("{}")
    (tmp_path / "checkpoints" / ".step-00000000.doomed").mkdir()
    remove(tmp_path, [1])
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
