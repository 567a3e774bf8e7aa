"""What ranks tell one another, read one step later."""

from pathlib import Path
from typing import Any

from tests.distributed import run_on_ranks


def told(payload: dict[str, Any]) -> list[Any]:
    """What rank 0 hears at each step, of counts and losses that differ by rank and step."""
    import torch
    import torch.distributed as dist

    from vitscale.agreement import Agreement

    rank, agreement, heard = dist.get_rank(), Agreement[str](torch.device("cpu")), []
    for step in range(payload["steps"]):
        agreement.tell(f"rank {rank}, step {step}", torch.tensor(float(10 * step + rank)), TERM=int(rank == 1 and step >= 2), written=step)
        heard.append([[one.note, one.loss, one.sums] for one in agreement.heard(all_=step == 3)])
    heard.append([[one.note, one.loss, one.sums] for one in agreement.heard(all_=True)])
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, [[(loss, sums) for _, loss, sums in at_once] for at_once in heard])
    assert all(one == everybody[0] for one in everybody), "all ranks hear the same at the same step"
    return heard


def test_all_hear_the_same_one_step_later(tmp_path: Path) -> None:
    heard = run_on_ranks("tests.vitscale.test_agreement:told", 3, {"steps": 6}, tmp_path)
    of_step = [[f"rank 0, step {step}", 10 * step + 1, {"TERM": int(step >= 2), "written": 3 * step}] for step in range(6)]
    assert heard == [[], [of_step[0]], [of_step[1]], [of_step[2], of_step[3]], [], [of_step[4]], [of_step[5]]]
