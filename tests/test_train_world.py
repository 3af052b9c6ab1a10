"""Processes that train together: they may meet again and again, and leave a group that is there as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tcc.train.world import World, join_world

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


def test_processes_meet_more_than_once(tmp_path: Path) -> None:
    """A late process does not find the others at the addresses of the meeting before."""
    script = tmp_path / "meet.py"
    script.write_text(MEET)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(launcher, env=env, capture_output=True, text=True, timeout=120, check=False)
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
