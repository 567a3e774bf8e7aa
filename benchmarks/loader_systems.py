"""The loaders that `loader.py` compares, each as its own documentation has it, in a process of its own that is told when to run.

    python benchmarks/loader_systems.py SYSTEM DATA --cores 0,1      # then a line of JSON on stdin for each measurement

All of them read the same JPEG files, cut a random part of 5 to 100% of the area, resize it to 224 x 224 (bilinear, antialiased), mirror
half of them, and give batches: float32 (B, C, H, W), normalised, in one piece; or, where the name says so, uint8 (B, H, W, C), which
vitscale's training normalises on the device. A system is a function from (data, workers, batch size) to an endless iterator of batches. On
one core nothing has worker processes, as these would share it with the process that waits for them; on several there is one for each.
"""

import argparse
import contextlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

SIZE = 224
SCALE, RATIO = (0.05, 1.0), (3 / 4, 4 / 3)
MEAN = STD = (0.5, 0.5, 0.5)
MANY = 10_000_000  # samples: an epoch that no measurement ends


@dataclass(frozen=True)
class Data:
    """Photographs of one size in all formats, as `loader.py` wrote them."""

    folder: Path

    @property
    def files(self) -> Path:
        """Class folders of JPEG files."""
        return self.folder / "files"

    @property
    def dataset(self) -> Path:
        """The split that `vitscale pack` wrote."""
        return self.folder / "packed" / "train"

    @property
    def tars(self) -> list[str]:
        """Its tars, which are any WebDataset's."""
        return sorted(str(tar) for tar in self.dataset.glob("shards/*/*.tar"))

    def labelled(self) -> list[tuple[str, int]]:
        """Files and classes, as torchvision's ImageFolder lists them."""
        names = sorted(folder.name for folder in self.files.iterdir())
        return [(str(path), label) for label, name in enumerate(names) for path in sorted((self.files / name).iterdir())]


Batches = Iterator[Any]
System = Callable[..., Batches]


# -- The usual road -----------------------------------------------------------------------------------------------------------------------


class TorchvisionEqual:
    """torchvision's RandomResizedCrop, RandomHorizontalFlip, ToTensor and Normalize, by Pillow and torch alone: the same draws and pixels.

    `check_equal` proves that where torchvision is installed.
    """

    def __call__(self, image: Any) -> Any:
        """The model's input, from a Pillow image."""
        import numpy as np
        import torch
        from PIL import Image

        left, top, width, height = self._box(*image.size)
        view = image.crop((left, top, left + width, top + height)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        if torch.rand(1) < 0.5:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels_HWC = torch.from_numpy(np.array(view, copy=True))
        pixels_CHW = pixels_HWC.permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        mean_C11, std_C11 = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
        return pixels_CHW.sub_(mean_C11).div_(std_C11)

    @staticmethod
    def _box(width: int, height: int) -> tuple[int, int, int, int]:
        import torch

        log_ratio = torch.log(torch.tensor(RATIO))
        for _ in range(10):
            area = width * height * torch.empty(1).uniform_(*SCALE).item()
            ratio = torch.exp(torch.empty(1).uniform_(float(log_ratio[0]), float(log_ratio[1]))).item()
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                top = int(torch.randint(0, height - h + 1, size=(1,)).item())
                return int(torch.randint(0, width - w + 1, size=(1,)).item()), top, w, h
        w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
        return (width - w) // 2, (height - h) // 2, w, h


def torchvision_transform() -> Any:
    """torchvision's own, of Pillow images."""
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, SCALE, RATIO),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def tensor_transform() -> Any:
    """torchvision's second version on uint8 tensors, which its documentation calls the fast one."""
    import torch
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, SCALE, RATIO, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def check_equal(files: list[str]) -> int:
    """Asserts that `TorchvisionEqual` gives torchvision's pixels, to the last bit, for these files; how many they are."""
    import torch
    from PIL import Image

    ours, theirs = TorchvisionEqual(), torchvision_transform()
    for number, file in enumerate(files):
        image = Image.open(file).convert("RGB")
        torch.manual_seed(number)
        expected = theirs(image)
        torch.manual_seed(number)
        if not torch.equal(ours(image), expected):
            raise AssertionError(f"{file}: not torchvision's pixels")
    return len(files)


class Files:
    """A map-style dataset as torchvision's ImageFolder is one."""

    def __init__(self, items: list[tuple[str, int]], load: Callable[[str], Any]) -> None:
        self.items, self.load = items, load

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        path, label = self.items[i]
        return self.load(path), label


class LoadPillow:
    """A file's image by Pillow, transformed."""

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        self.transform = transform

    def __call__(self, path: str) -> Any:
        """As torchvision's `default_loader`, then the transform."""
        from PIL import Image

        with open(path, "rb") as file:
            return self.transform(Image.open(file).convert("RGB"))


class LoadTensor:
    """A file's image by torchvision's own decoder, transformed."""

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        self.transform = transform

    def __call__(self, path: str) -> Any:
        """As torchvision's documentation recommends for speed."""
        from torchvision.io import ImageReadMode, decode_image

        return self.transform(decode_image(path, mode=ImageReadMode.RGB))


def torch_files(data: Data, workers: int, batch_size: int, load: Callable[[str], Any] | None = None) -> Batches:
    """torch's DataLoader over image files."""
    from torch.utils.data import DataLoader, RandomSampler

    files: Any = Files(data.labelled(), load or LoadPillow(TorchvisionEqual()))
    sampler = RandomSampler(files, replacement=True, num_samples=MANY)
    loader = DataLoader(files, batch_size, sampler=sampler, num_workers=worker_processes(workers), drop_last=True)
    return (images for images, _ in loader)


def webdataset_pillow(data: Data, workers: int, batch_size: int, transform: Callable[[Any], Any] | None = None) -> Batches:
    """webdataset's tar iterators as its README has them, decoding by Pillow."""
    import webdataset as wds

    dataset = (
        wds.WebDataset(data.tars, resampled=True, shardshuffle=False, nodesplitter=None)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "json")
        .map_tuple(transform or TorchvisionEqual(), lambda described: described["labels"][0])
        .batched(batch_size)
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=worker_processes(workers))
    return (images for images, _ in loader)


def worker_processes(workers: int) -> int:
    """None on a single core: the process itself loads there."""
    return 0 if workers == 1 else workers


# -- vitscale -----------------------------------------------------------------------------------------------------------------------------


def open_stream(
    dataset: Path, batch_size: int, size: int = SIZE, *, micro_batch_size: int = 0, world_size: int = 1, seed: int = 0,
    preprocess: dict[str, Any] | None = None, **settings: Any,
) -> Any:  # fmt: skip
    """vitscale's stream of training batches for rank 0, by default of a world of one; `settings` are StreamConfig's."""
    from vitscale.config import PreprocessConfig, StreamConfig
    from vitscale.mixture import Mixture
    from vitscale.stream import Share, TrainStream
    from vitscale.timeline import steady

    return TrainStream(
        Mixture.open([dataset]), PreprocessConfig(**(preprocess or {})), StreamConfig(**{"lanes": 1, "window": 2**20} | settings),
        Share(steady((size, size), batch_size, micro_batch_size or batch_size), 0, world_size), seed=seed,
        quarantine=dataset.parent / "quarantine.jsonl",
    )  # fmt: skip


def vitscale_uint8(data: Data, workers: int, batch_size: int, **settings: Any) -> Batches:
    """vitscale's stream as training takes it."""
    stream = open_stream(data.dataset, batch_size, workers=workers, **settings)
    return (batch.images_BHWC for batch in stream.micro_batches(0))


def vitscale_float(data: Data, workers: int, batch_size: int, **settings: Any) -> Batches:
    """The same, then normalised on the CPU: the numbers of `vitscale.model.normalize`, to the last bit, by looking each byte up."""
    import numpy as np

    pixels = np.arange(256, dtype=np.float32) / np.float32(255)
    tables = [(pixels - np.float32(mean)) / np.float32(std) for mean, std in zip(MEAN, STD, strict=True)]
    for images_BHWC in vitscale_uint8(data, workers, batch_size, **settings):
        images_BCHW = np.empty((batch_size, 3, SIZE, SIZE), np.float32)
        for image_HWC, image_CHW in zip(images_BHWC, images_BCHW, strict=True):
            for channel, table in enumerate(tables):
                np.take(table, image_HWC[..., channel], out=image_CHW[channel], mode="clip")
        yield images_BCHW


def decoder_alone(data: Data, workers: int, batch_size: int) -> Batches:
    """The limit: every image decoded in full by libjpeg-turbo, from memory, and nothing else; on several cores by threads."""
    from concurrent.futures import ThreadPoolExecutor

    decode = full_decoder()
    encoded = [Path(path).read_bytes() for path, _ in data.labelled()]
    random.Random(0).shuffle(encoded)
    with ThreadPoolExecutor(workers) as pool:
        for batch in _batches(itertools.cycle(encoded), batch_size):
            list(pool.map(decode, batch)) if workers > 1 else [decode(image) for image in batch]
            yield batch


def _batches(items: Iterator[bytes], size: int) -> Iterator[list[bytes]]:
    while batch := list(itertools.islice(items, size)):
        yield batch


def full_decoder() -> Callable[[bytes], Any]:
    """JPEG bytes to RGB pixels: simplejpeg where it is installed, which calls libjpeg-turbo and copies nothing, else Pillow."""
    try:
        from simplejpeg import decode_jpeg

        return decode_jpeg
    except ImportError:
        from PIL import Image

        return lambda data: Image.open(io.BytesIO(data)).load()


# -- Peers --------------------------------------------------------------------------------------------------------------------------------


def torch_files_tensors(data: Data, workers: int, batch_size: int) -> Batches:
    """torch's DataLoader over image files, decoded and transformed by torchvision as tensors."""
    return torch_files(data, workers, batch_size, LoadTensor(tensor_transform()))


def webdataset_torchvision(data: Data, workers: int, batch_size: int) -> Batches:
    """webdataset with torchvision's own transforms."""
    return webdataset_pillow(data, workers, batch_size, torchvision_transform())


def mosaic(data: Data, workers: int, batch_size: int) -> Batches:
    """MosaicML Streaming: MDS shards of JPEG bytes, its shuffle, torch's DataLoader."""
    from PIL import Image
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    transform = torchvision_transform()
    out = data.folder / "mds"
    if not out.is_dir():
        with MDSWriter(out=str(out), columns={"image": "jpeg", "label": "int"}) as writer:
            for path, label in data.labelled():
                writer.write({"image": Image.open(path), "label": label})

    class Transformed(StreamingDataset):
        def __getitem__(self, i: int) -> tuple[Any, int]:
            sample = super().__getitem__(i)
            return transform(sample["image"]), sample["label"]

    clean_stale_shared_memory()
    dataset = Transformed(local=str(out), shuffle=True, batch_size=batch_size, epoch_size=100_000)
    loader = DataLoader(dataset, batch_size, num_workers=worker_processes(workers), drop_last=True)
    return (images for images, _ in loader)


def _litdata_sample(item: tuple[str, int]) -> dict[str, Any]:
    from PIL import Image

    return {"image": Image.open(item[0]), "label": item[1]}


def litdata(data: Data, workers: int, batch_size: int) -> Batches:
    """litData: optimised chunks of JPEG bytes, decoded by torchvision to tensors, its own DataLoader."""
    from litdata import StreamingDataLoader, StreamingDataset, optimize

    out = data.folder / "litdata"
    if not out.is_dir():
        optimize(_litdata_sample, data.labelled(), str(out), num_workers=1, chunk_bytes="64MB")
    transform = tensor_transform()

    class Transformed(StreamingDataset):
        def __getitem__(self, i: Any) -> tuple[Any, int]:
            sample = super().__getitem__(i)
            return transform(sample["image"]), sample["label"]

    dataset = Transformed(str(out), shuffle=True, drop_last=True)
    loader = StreamingDataLoader(dataset, batch_size=batch_size, num_workers=worker_processes(workers), persistent_workers=workers > 1)
    while True:
        yield from (images for images, _ in loader)


def dali(data: Data, workers: int, batch_size: int) -> Batches:
    """DALI on the CPU: its webdataset reader, with the index that it wants, and its decoder that decodes only a random part."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=batch_size, num_threads=workers, device_id=None)
    def pipeline() -> Any:
        encoded, _ = fn.readers.webdataset(
            paths=data.tars, ext=["jpg", "json"], random_shuffle=True, initial_fill=1000, missing_component_behavior="error"
        )
        images = fn.decoders.image_random_crop(
            encoded, device="cpu", output_type=types.RGB, random_area=SCALE, random_aspect_ratio=RATIO, num_attempts=10
        )
        images = fn.resize(images, size=(SIZE, SIZE), interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.crop_mirror_normalize(
            images, dtype=types.FLOAT, output_layout="CHW", mean=[255 * m for m in MEAN], std=[255 * s for s in STD],
            mirror=fn.random.coin_flip(),
        )  # fmt: skip

    pipe = pipeline()
    pipe.build()
    while True:
        yield pipe.run()[0].as_tensor()


def ffcv(data: Data, workers: int, batch_size: int) -> Batches:
    """FFCV: a beton of JPEG images, its compiled loader with a random-resized-crop decoder."""
    import numpy as np
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter

    out = data.folder / "ffcv.beton"
    if not out.is_file():
        writer = DatasetWriter(str(out), {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "label": IntField()})
        writer.from_indexed_dataset(Files(data.labelled(), LoadPillow(np.asarray)))
    decoder = RandomResizedCropRGBImageDecoder((SIZE, SIZE), SCALE, RATIO)
    scale = np.asarray([255.0 * m for m in MEAN]), np.asarray([255.0 * s for s in STD])
    steps = {
        "image": [decoder, RandomHorizontalFlip(), NormalizeImage(*scale, np.float32), ToTensor(), ToTorchImage(channels_last=False)],
        "label": [IntDecoder(), ToTensor()],
    }
    loader = Loader(str(out), batch_size=batch_size, num_workers=workers, order=OrderOption.RANDOM, pipelines=steps, drop_last=True)
    batches = (images for epoch in itertools.repeat(loader) for images, _ in epoch)
    for _ in itertools.islice(batches, 16):
        pass  # it compiles its steps when it first needs them, which is no part of loading
    yield from batches


# -- Which there are ----------------------------------------------------------------------------------------------------------------------

BASELINE = "webdataset + Pillow"
OURS: dict[str, System] = {
    "vitscale exact": vitscale_uint8,
    "vitscale exact, float32": vitscale_float,
    "vitscale fast": partial(vitscale_uint8, decode="fast"),
    "vitscale fast, float32": partial(vitscale_float, decode="fast"),
}
USUAL: dict[str, System] = {BASELINE: webdataset_pillow, "torch DataLoader over files": torch_files}
LIMIT: dict[str, System] = {"libjpeg-turbo, full decode alone": decoder_alone}
PEERS: dict[str, System] = {
    "webdataset + torchvision": webdataset_torchvision,
    "torch DataLoader, tensors": torch_files_tensors,
    "MosaicML Streaming": mosaic,
    "litData": litdata,
    "DALI on CPU": dali,
    "FFCV": ffcv,
}
SYSTEMS: dict[str, System] = USUAL | OURS | LIMIT | PEERS
PACKAGES = "torch torchvision pillow webdataset mosaicml-streaming litdata nvidia-dali-cuda120 ffcv simplejpeg vitscale".split()


# -- One process a system -----------------------------------------------------------------------------------------------------------------


def measure(batches: Batches, batch_size: int, seconds: float) -> dict[str, float]:
    """Images a second from one batch's arrival to another's, for `seconds` or more, after two batches and a third of that time."""
    warm = seconds / 3
    begun = time.perf_counter()
    taken = 0
    while taken < 2 or time.perf_counter() - begun < warm:
        next(batches)
        taken += 1
    cpu = cpu_seconds()
    started = now = time.perf_counter()
    images = 0
    while now - started < seconds:
        next(batches)
        now = time.perf_counter()
        images += batch_size
    cpu = cpu_seconds() - cpu
    return {"images": images, "seconds": now - started, "rate": images / (now - started), "cpu_seconds": cpu}


def cpu_seconds() -> float:
    """Of this process and all that descend from it and live."""
    return sum(of.ticks for of in family().values()) / os.sysconf("SC_CLK_TCK")


class Process(NamedTuple):
    """A line of /proc/PID/stat."""

    parent: int
    ticks: int


def family() -> dict[int, Process]:
    """This process and all that descend from it and live, by their numbers."""
    processes = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            fields = stat.read_text().rpartition(")")[2].split()
            processes[int(stat.parent.name)] = Process(int(fields[1]), int(fields[11]) + int(fields[12]))
    found = {os.getpid()}
    while more := {pid for pid, process in processes.items() if process.parent in found} - found:
        found |= more
    return {pid: processes[pid] for pid in found}


def spin(turns: int) -> float:
    """Seconds that so many turns of a loop of plain Python take."""
    started = time.perf_counter()
    total = 0
    for turn in range(turns):
        total += turn
    return time.perf_counter() - started


def python_beside(batches: Batches, batch_size: int, rate: float, turns_a_second: float, seconds: float) -> dict[str, float]:
    """How much slower plain Python runs in the thread that takes the batches, two thirds as many as the loader could make."""
    wanted = 1.5 * batch_size / rate
    busy = waited = 0.0
    turns = 0
    while busy + waited < seconds or turns < 5:
        busy += spin(round(turns_a_second * wanted))
        asked = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - asked
        turns += 1
    return {"python_slower": busy / (turns * wanted), "waited_share": waited / (busy + waited)}


def main() -> None:
    """Loads when it is told to, a line of JSON each: data (folder), batch_size, seconds, and perhaps workers, settings, beside.

    Answers with a line each, where it cannot load with an error.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("--cores", required=True)
    flags = parser.parse_args()
    cores = {int(core) for core in flags.cores.split(",")}
    os.sched_setaffinity(0, cores)
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print
    for line in sys.stdin:
        try:
            answer = answered(flags.system, cores, **json.loads(line))
        except Exception as error:  # told instead of measured
            text = str(error).strip().splitlines()
            answer = {"error": f"{type(error).__name__}: {text[0] if text else 'no message'}"}
        print(json.dumps(answer), file=answers, flush=True)


def answered(
    system: str, cores: set[int], *, data: str, batch_size: int, seconds: float, workers: int = 0,
    settings: dict[str, Any] | None = None, beside: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """One measurement; the loader is made for it, and ends with it."""
    turns_a_second = 2_000_000 / spin(2_000_000) if beside else 0.0
    batches = iter(SYSTEMS[system](Data(Path(data)), workers or len(cores), batch_size, **(settings or {})))
    answer: dict[str, Any] = measure(batches, batch_size, seconds)
    if beside:
        answer |= python_beside(batches, batch_size, answer["rate"], turns_a_second, seconds)
    if isinstance(batches, Generator):
        batches.close()
    del batches
    answer["versions"] = versions()
    if system == "webdataset + torchvision":
        answer["equal_to_torchvision"] = check_equal([path for path, _ in Data(Path(data)).labelled()[::50]])
    return answer


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
