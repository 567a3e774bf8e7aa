"""A dataset shared out to the ranks of the process group, and what they found put together; alone where there is no group.

Where it stands: `evaluate.py` and `features.py` go over a dataset by `own_batches`, and bring their results together by `add` and `gather`.

Invariant: every rank has equally many batches of equally many rows, so that all meet in each collective; rows that are no sample's are
marked (`DeviceBatch.valid_B`).
"""

import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from data_tools.dataset import Dataset, DatasetError
from data_tools.progress import Update, no_update
from vitscale.config import PreprocessConfig, StreamConfig
from vitscale.mixture import Mixture
from vitscale.stream import evaluation_batches
from vitscale.transfer import DeviceBatch, on_device


def meet() -> None:
    """Joins the ranks that RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe: NCCL on GPUs, gloo elsewhere."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def place() -> tuple[int, int]:
    """Rank and number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def own_device() -> torch.device:
    """This rank's GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def own_batches(
    dataset: Dataset, image_size: tuple[int, int], preprocess: PreprocessConfig, stream: StreamConfig, *, device: torch.device,
    batch_size: int, progress: Update = no_update,
) -> Iterator[DeviceBatch]:  # fmt: skip
    """This rank's share of a dataset's samples, each of which one rank has once, by its view in evaluation.

    Args:
        progress: called with this rank's (samples done, samples in all) after each batch.
    """
    rank, world_size = place()
    of_rank, done = -(-dataset.num_kept // world_size), 0
    batches = evaluation_batches(
        Mixture([dataset]), image_size, preprocess, stream, batch_size=batch_size, rank=rank, world_size=world_size
    )
    for batch in on_device(batches, device):
        yield batch
        done += len(batch.valid_B)
        progress(min(done, of_rank), of_rank)


def add(counts: Tensor) -> None:
    """Sums counts over all ranks, in place."""
    if dist.is_initialized():
        on_device = counts.to(own_device())
        dist.all_reduce(on_device)
        counts.copy_(on_device)


def gather(rows: Tensor) -> Tensor:
    """The rows of all ranks, those of rank 0 first; each rank has equally many."""
    if not dist.is_initialized():
        return rows
    gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rows)
    return torch.cat(gathered)


def unreadable(dataset: Dataset) -> DatasetError:
    """What is raised where no rank found a sample."""
    removed = dataset.overlay.num_removed
    return DatasetError(
        f"none of the {dataset.num_samples} samples of {dataset.path} can be read ({removed} are removed by overlays); pack it again"
    )
