"""That ranks which do not come, or are not like the others, are named on all that did, before there is a process group."""

import os
import shutil
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.meeting import ROOT, meet
from vitscale.ending import Cause, Ended
from vitscale.machine import expand_nodes
from vitscale.rendezvous import absent, check_alike, spans


def test_ranks_that_never_come_are_named(tmp_path: Path) -> None:
    first, _, third, _ = meet(tmp_path, [{}, None, {}, None], arrival=10)
    assert first == third
    assert first == {
        "cause": "bad node",
        "words": "2 of 4 ranks did not come to the rendezvous within 10 s: n2 (not rank 1), n4 (not rank 3)",
        "bad_nodes": ["n2", "n4"],
    }


def test_without_rank_0_the_others_name_its_node(tmp_path: Path) -> None:
    _, second = meet(tmp_path, [None, {}], arrival=3)
    assert second
    assert second["cause"] == "bad node"
    assert second["words"].startswith("rank 0 on n1 was not there at 127.0.0.1:")
    assert second["bad_nodes"] == ["n1"]


def test_a_port_that_another_program_has_blames_no_node(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        (only,) = meet(tmp_path, [{"MASTER_PORT": str(taken.getsockname()[1])}])
    assert only
    assert (only["cause"], only["bad_nodes"]) == ("lost peer", [])
    assert "rank 0 cannot open the ranks' store at 127.0.0.1:" in only["words"]


def test_a_node_with_other_code_is_refused(tmp_path: Path) -> None:
    for package in ("data_tools", "launch", "vitscale"):
        shutil.copytree(ROOT / package, tmp_path / "code" / package, ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "code/vitscale/objective.py", "a") as edited:
        edited.write("# an edit that reached one node\n")
    other = {"PYTHONPATH": f"{tmp_path / 'code'}{os.pathsep}{ROOT}"}
    told = meet(tmp_path / "ranks", [{}, other, {}])
    assert told[0] == told[1] == told[2]
    assert told[0]
    assert (told[0]["cause"], told[0]["bad_nodes"]) == ("bad node", ["n2"])
    assert told[0]["words"].startswith("the ranks' code differ: ")
    assert " on n2 (rank 1); " in told[0]["words"]


def test_code_is_the_same_wherever_it_lies(tmp_path: Path) -> None:
    for package in ("data_tools", "launch", "vitscale"):
        shutil.copytree(ROOT / package, tmp_path / package)
    asked = [sys.executable, "-P", "-c", "import vitscale.rendezvous as r; print(r.__file__, r.code_hash())"]
    files, hashes = zip(
        *(
            subprocess.run(asked, env=os.environ | {"PYTHONPATH": str(place)}, check=True, capture_output=True, text=True).stdout.split()
            for place in (tmp_path, ROOT)
        ),
        strict=True,
    )
    assert files[0] != files[1]
    assert hashes[0] == hashes[1]


def _said(host: str, **other: object) -> dict[str, object]:
    return {"host": host, "versions": {"python": "3.11.2", "torch": "2.13.0"}, "code": "aa", "devices": "8 H200", "gpus": 8} | other


def test_the_minority_is_refused_whichever_rank_0_is() -> None:
    old = {"versions": {"python": "3.11.2", "torch": "2.12.0"}}
    with pytest.raises(Ended, match=r"versions differ: torch 2.12.0 on n1 \(rank 0-1\); torch 2.13.0 on all others") as ended:
        check_alike([_said("n1", **old), _said("n1", **old), *[_said(node) for node in ("n2", "n2", "n3", "n3")]], 2)
    assert ended.value.bad_nodes == ("n1",)
    with pytest.raises(Ended, match=r"8 H100 on n2 \(rank 1\); 8 H200 on all others") as ended:  # of two, rank 0's is right
        check_alike([_said("n1"), _said("n2", devices="8 H100")], 1)
    assert ended.value.bad_nodes == ("n2",)


def test_a_layout_that_is_not_node_by_node_is_refused() -> None:
    with pytest.raises(Ended, match=r"ranks 0 to 1 should be one node's.*are on n1, n2.*--distribution=block") as ended:
        check_alike([_said(node) for node in ("n1", "n2", "n1", "n2")], 2)
    assert ended.value.cause is Cause.INPUT


def test_too_few_gpus_everywhere_blame_no_node() -> None:
    with pytest.raises(Ended, match="16 ranks a node need as many visible GPUs, and each node has 8 H200") as ended:
        check_alike([_said("n1")] * 16, 16)
    assert (ended.value.cause, ended.value.bad_nodes) == (Cause.INPUT, ())


def test_who_is_absent_in_words() -> None:
    hosts = {rank: f"n{rank // 4 + 1}" for rank in range(12) if rank not in (5, 6, 8, 9, 10, 11)}
    ended = absent(hosts, 14, 4, ("n1", "n2", "n3"), "rendezvous", timedelta(seconds=60))
    assert ended.words == (
        "8 of 14 ranks did not come to the rendezvous within 60 s: n2 (not rank 5-6), n3 (none of ranks 8-11), "
        "node 3 (none of ranks 12-13); of so many nodes none is left out"
    )
    assert (ended.cause, ended.bad_nodes) == (Cause.LOST_PEER, ())
    ended = absent(hosts | dict.fromkeys(range(8, 18), "n3"), 18, 4, ("n1", "n2", "n3"), "rendezvous", timedelta(seconds=60))
    assert (ended.cause, ended.bad_nodes) == (Cause.BAD_NODE, ("n2",))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("login", ["login"]),
        ("n[1-3,7],gpu-[01-02]-ib,login", ["n1", "n2", "n3", "n7", "gpu-01-ib", "gpu-02-ib", "login"]),
        ("rack[1-2]n[09-10]", ["rack1n09", "rack1n10", "rack2n09", "rack2n10"]),
    ],
)
def test_lists_of_nodes(text: str, names: list[str]) -> None:
    assert list(expand_nodes(text)) == names


@given(st.sets(st.integers(0, 200)))
def test_spans_tell_each_number_once(numbers: set[int]) -> None:
    assert list(expand_nodes(f"n[{spans(sorted(numbers)).replace(' ', '')}]" if numbers else "")) == [f"n{n}" for n in sorted(numbers)]
