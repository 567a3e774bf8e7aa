"""Site files: the example has every key, and what is wrong with one is told in a line."""

import dataclasses
import tomllib
from pathlib import Path

import pytest

from launch.site import Container, Site, SiteError, minutes, read_site

EXAMPLE = Path(__file__).parents[2] / "docs" / "site.toml"


def test_the_example_has_every_key() -> None:
    site = read_site(EXAMPLE)
    values = tomllib.loads(EXAMPLE.read_text())
    assert set(values) == {field.name for field in dataclasses.fields(Site)}
    assert set(values["container"]) == {field.name for field in dataclasses.fields(Container)}
    assert site.container == Container("pyxis", "/images/vitscale.sqsh", ("/datasets", "/checkpoints", "/local"))
    assert site.environment["NCCL_IB_HCA"] == "mlx5"
    assert site.datasets == {"jft300m": "/datasets/jft300m/train"}


def test_an_empty_file_is_a_site(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text("")
    assert read_site(tmp_path / "site.toml") == Site()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("acount = 'x'", ["unknown key acount", "account"]),
        ("gpus_per_node = '8'", ["gpus_per_node='8'", "a whole number"]),
        ("gpus_per_node = true", ["gpus_per_node=True", "a whole number"]),
        ("gpus_per_node = -1", ["gpus_per_node=-1", "at least 0"]),
        ("partitions = 'gpu'", ["partitions='gpu'", "a list of texts"]),
        ("partitions = ['a', 3]", ["partitions=3"]),
        ("gpu_type = 'h100,a100'", ["h100,a100", "one type"]),
        ("gpus_per_node = 8\npartitions = ['a', 'b']", ["gpu_type says which"]),
        ("time = '1 day'", ["'1 day'", "24:00:00"]),
        ("signal_lead_seconds = 0", ["signal_lead_seconds=0", "120 works"]),
        ("sbatch = ['--gres=gpu:a100:8']", ["--gres=gpu:a100:8", "sets itself"]),
        ("sbatch = ['-N4']", ["-N4", "sets itself"]),
        ('setup = ["a\\nb"]', ["control character"]),
        ("[container]\nimage = 'x'", ["lacks runtime"]),
        ("[container]\nruntime = 'docker'\nimage = 'x'", ["docker", "pyxis, apptainer"]),
        ("container = 'x'", ["container='x'", "a table"]),
        ("[environment]\nNCCL_DEBUG = 1", ["environment.NCCL_DEBUG=1", "a text"]),
        ("[environment]\n'A-B' = '1'", ["environment.A-B", "letters"]),
        ("account =", ["is not TOML"]),
    ],
)
def test_what_cannot_work_is_told_in_a_line(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "site.toml"
    file.write_text(text)
    with pytest.raises(SiteError) as caught:
        read_site(file)
    assert all(word in str(caught.value) for word in [str(file), *words]), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("time", "expected"), [("90", 90), ("90:30", 90.5), ("24:00:00", 1440), ("1-12", 2160), ("1-12:30", 2190), ("2-00:00:30", 2880.5)]
)
def test_a_time_limit_in_minutes(time: str, expected: float) -> None:
    assert minutes(time) == expected
