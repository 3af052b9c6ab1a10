"""Processes that train together: they may meet again and again, and leave a group that is there as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tcc.train.loop import Settings, train
from tcc.train.world import World, join_world
from tests.test_train_loop import Noisy, Numbers

# one process is late to the second meeting, the other to the third
MEET = """
import time, torch
from tcc.train.world import join_world
for count in range(3):
    with join_world() as world:
        total = world.sum(torch.tensor([world.rank + 1.0]))
    assert total.tolist() == [3.0], total
    if world.rank == count:
        time.sleep(1)
print("met three times")
"""


# each process has a state of its own, and only the first one's is there
APART = """
import sys
from pathlib import Path
from tcc.errors import TrainError
from tcc.train.loop import Settings, train
from tcc.train.world import join_world
from tests.test_train_loop import Noisy, Numbers
with join_world() as world:
    try:
        train(Numbers(), Noisy(), Settings(4, groups=2), state=Path(sys.argv[1]) / f"{world.rank}.state", world=world)
    except TrainError as error:
        print(error)
"""


def test_processes_that_begin_apart_are_refused(tmp_path: Path) -> None:
    """One has found a state, and the other has not: all of them say so, and nothing is trained."""
    train(Numbers(), Noisy(), Settings(2, groups=2), state=tmp_path / "0.state")
    before = (tmp_path / "0.state").read_bytes()
    done = launched(APART, tmp_path, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the processes go on from iterations [2, 0]: each of them reads") == 2
    assert (tmp_path / "0.state").read_bytes() == before


def launched(code: str, folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """What two processes say."""
    script = folder / "script.py"
    script.write_text(code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.run([*launcher, *args], env=env, capture_output=True, text=True, timeout=120, check=False)


def test_processes_meet_more_than_once(tmp_path: Path) -> None:
    """A late process does not find the others at the addresses of the meeting before."""
    done = launched(MEET, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("met three times") == 2


def test_a_group_that_is_there_is_used_and_left() -> None:
    """What the caller has set up stays set up."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with join_world() as world:
            assert world == World(0, 1)
            assert world.sum(torch.ones(2)).tolist() == [1, 1]
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_a_lone_process_needs_no_group() -> None:
    """Nothing is set up where nobody else trains."""
    with join_world() as world:
        assert (world, world.speaks) == (World(), True)
        assert not dist.is_initialized()
