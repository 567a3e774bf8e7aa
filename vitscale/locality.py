"""How a run reads its tars: lanes and windows, what a rank holds of them, and what that asks of a cluster's storage.

Where it stands: pure functions of a dataset's size and a run's layout; `data stats --for-world` prints them before there is a run, and a
run's start for itself. `order.py` has the rules that they follow from.
"""

import dataclasses
import math
from dataclasses import dataclass

from vitscale.config import StreamConfig
from vitscale.order import dealt_together
from vitscale.timeline import Timeline

WINDOW = 256  # samples
FEWEST_WINDOWS = 4  # in a lane of a dataset that is far away
NEXT_WINDOWS = 2  # of each lane: the one in use, and the next; beside those that micro-batches in the making still need


@dataclass(frozen=True)
class Size:
    """What of a dataset, or of several together, the arithmetic needs."""

    samples: int
    shards: int
    bytes: int
    """Of all tars."""
    datasets: int = 1
    remote: bool = False
    """Whether they lie in object storage."""


@dataclass(frozen=True)
class Locality:
    """How a run reads. Of ranks that have more than others, those that have the most."""

    samples: int
    world_size: int
    global_batch_size: int
    lanes: int
    """Of each dataset."""
    window: int
    """Samples."""
    bytes_per_sample: float
    lanes_per_rank: int
    """Of all datasets."""
    window_bytes: int
    buffer_bytes: int
    """The most that a rank may hold."""
    buffered_bytes_per_rank: int
    """Windows: of each lane the one in use, the next, and those that micro-batches in the making need; of single samples, those of the
    micro-batches where they come from far away, else none."""
    reads: str
    """`windows` or `samples`."""
    why: str
    """Why samples are read one by one; empty where windows are read."""
    paired: bool
    """Whether samples are dealt in pairs, which is where each rank's share of a step is even."""
    in_windows: float
    """Share of a step's samples that go to the rank that reads their window; the others are read one by one."""
    samples_per_read: float
    """Of a window, which is a read for each shard that it touches."""
    open_shards_per_rank: int
    """A shard a lane, and one more while a window lies on the seam of two, both for the window in use and the next."""


@dataclass(frozen=True)
class Traffic:
    """What a run that reads so asks of its storage at a given rate. Of nodes that differ, the one that has the most ranks."""

    nodes: int
    ranks_per_node: int
    buffered_bytes_per_node: int
    images_per_second_per_rank: float
    reads_per_second_per_rank: float
    reads_per_second_per_node: float
    reads_per_second: float
    """Of the whole cluster, as `bytes_per_second`."""
    bytes_per_read: int
    bytes_per_second_per_rank: float
    bytes_per_second_per_node: float
    bytes_per_second: float
    seconds_per_window: float
    """That a window of a lane lasts: how long the next one may take to come."""
    seconds_per_epoch: float


def choose_order(stream: StreamConfig, num_samples: int, global_batch_size: int, *, remote: bool = False) -> StreamConfig:
    """Fills in lanes and window where they are 0 (docs/design.md, "The clock and the order of samples").

    A dataset that is far away is read by windows where it has room for some: each of the reads of a full shuffle would be a request.

    Args:
        global_batch_size: of a run whose batches grow, what all of them are multiples of.
    """
    power = math.gcd(global_batch_size, 1024)  # a power of two
    if num_samples < 4_000_000:
        while remote and power * WINDOW * FEWEST_WINDOWS > num_samples and power > 1:
            power //= 2
        lanes = stream.lanes or (power if remote else 1)
        window = stream.window or (num_samples if lanes == 1 else WINDOW)  # one lane of one window: a full shuffle
    else:
        lanes, window = stream.lanes or power, stream.window or WINDOW
    return dataclasses.replace(stream, lanes=lanes, window=window)


def locality(size: Size, chosen: StreamConfig, *, global_batch_size: int, world_size: int, micro_batch_size: int | None = None) -> Locality:
    """How a run reads whose lanes and window are `chosen`; a micro-batch is a rank's share where none is given."""
    per_sample = size.bytes / size.samples
    window_bytes = round(min(chosen.window, -(-size.samples // chosen.lanes)) * per_sample)  # a window ends where its lane does
    together = dealt_together(global_batch_size // world_size)
    units = -(-chosen.lanes // together)
    each, more = divmod(units, world_size)  # so many ranks have one unit more
    lanes_per_rank = min(chosen.lanes, together * (each + (more > 0))) * size.datasets
    ahead = (chosen.prefetch + 1) * (micro_batch_size or global_batch_size // world_size)  # samples in the making
    windows_held = NEXT_WINDOWS + -(-ahead // (lanes_per_rank * chosen.window))
    held = windows_held * lanes_per_rank * window_bytes
    why = why_not_windows(chosen, world_size, held)
    # A rank that prefers more than its share leaves the rest to others, one that prefers less takes some of theirs.
    own = more * min(1 / world_size, (each + 1) / units) + (world_size - more) * min(1 / world_size, each / units)
    # A window that begins anywhere in the list of shards touches one, and one more for each seam inside.
    stretches = 1 + (chosen.window - 1) * size.shards / size.samples
    return Locality(
        samples=size.samples,
        world_size=world_size,
        global_batch_size=global_batch_size,
        lanes=chosen.lanes,
        window=chosen.window,
        bytes_per_sample=per_sample,
        lanes_per_rank=lanes_per_rank,
        window_bytes=window_bytes,
        buffer_bytes=chosen.buffer_bytes,
        buffered_bytes_per_rank=held if not why else round(ahead * per_sample) if size.remote else 0,
        reads="samples" if why else "windows",
        why=why,
        paired=together == 2,
        in_windows=0.0 if why else own,
        samples_per_read=1.0 if why else chosen.window / stretches,
        open_shards_per_rank=min(size.shards, lanes_per_rank * (2 if why else 2 * NEXT_WINDOWS)),
    )


def run_locality(size: Size, chosen: StreamConfig, timeline: Timeline, world_size: int) -> Locality:
    """How a run reads: as it does where it holds the most, for all of it reads in one way."""
    of_spans = [
        locality(
            size, chosen, global_batch_size=span.global_batch_size, world_size=world_size, micro_batch_size=span.micro_batch_size
        )
        for span in timeline.spans
    ]  # fmt: skip
    return max(of_spans, key=lambda of: (of.reads == "samples", of.buffered_bytes_per_rank))


def traffic(of: Locality, images_per_second_per_rank: float, ranks_per_node: int = 8) -> Traffic:
    """What it asks of the storage at that rate."""
    alone = 0.0 if of.why else 1 - of.in_windows  # read one by one by a rank, and once more in a window that another reads whole
    reads = images_per_second_per_rank * (1 / of.samples_per_read + alone)
    rank_bytes = images_per_second_per_rank * of.bytes_per_sample * (1 + alone)
    node = min(ranks_per_node, of.world_size)
    return Traffic(
        nodes=-(-of.world_size // ranks_per_node),
        ranks_per_node=node,
        buffered_bytes_per_node=of.buffered_bytes_per_rank * node,
        images_per_second_per_rank=images_per_second_per_rank,
        reads_per_second_per_rank=reads,
        reads_per_second_per_node=reads * node,
        reads_per_second=reads * of.world_size,
        bytes_per_read=round(rank_bytes / reads),
        bytes_per_second_per_rank=rank_bytes,
        bytes_per_second_per_node=rank_bytes * node,
        bytes_per_second=rank_bytes * of.world_size,
        seconds_per_window=of.window * of.lanes_per_rank / images_per_second_per_rank,
        seconds_per_epoch=of.samples / (images_per_second_per_rank * of.world_size),
    )


def why_not_windows(chosen: StreamConfig, world_size: int, held: int) -> str:
    """Why windows are not read whole; empty where they are.

    Args:
        held: bytes that a rank would hold.
    """
    if chosen.reads == "windows":
        return ""
    if chosen.reads == "samples":
        return "--stream.reads samples asks for it"
    if chosen.lanes == 1:
        return "one lane is one full shuffle, whose neighbours lie nowhere near each other"
    if chosen.lanes < world_size:
        return f"{chosen.lanes} lanes are fewer than {world_size} ranks; --stream.lanes {2 * world_size} gives each its own"
    if held > chosen.buffer_bytes:
        room = f"the {chosen.buffer_bytes / 2**20:,.0f} MiB of --stream.buffer-bytes"
        return f"{held / 2**20:,.0f} MiB of windows a rank are over {room}"
    return ""
