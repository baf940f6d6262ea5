"""Runs the state machines for longer than the tests do, and writes down how many calls they made and how these ended.

python -m tests.hostile --examples 300 --output benchmarks/results/hostile.json
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from benchmarks.outcomes.results import describe_session

from .machine import CALLS
from .refresh_machine import RefreshMachine
from .statistics_machine import StatisticsMachine
from .training_machine import TrainingMachine
from .tree_machine import TreeMachine

MACHINES = {machine.__name__: machine for machine in (StatisticsMachine, TreeMachine, TrainingMachine, RefreshMachine)}


def counts_of(name):
    """{call: {how it ended: how often}}, with "done" for those that were not to be refused."""
    counts = {}
    for (machine, call, ended), count in sorted(CALLS.items()):
        if machine == name:
            counts.setdefault(call, {})[ended] = count
    return counts


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=300, help="sequences of calls for each machine")
    parser.add_argument("--steps", type=int, default=30, help="the most calls of a sequence")
    parser.add_argument("--machines", nargs="+", choices=MACHINES, default=list(MACHINES))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = settings(
        max_examples=arguments.examples,
        stateful_step_count=arguments.steps,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    command = " ".join(["python -m tests.hostile", *sys.argv[1:]])
    metadata = {**describe_session("cpu"), "command": command, "examples": arguments.examples, "steps": arguments.steps}
    document = {"metadata": metadata, "machines": {}}
    for name in arguments.machines:
        start = time.perf_counter()
        run_state_machine_as_test(MACHINES[name], settings=chosen)
        counts = counts_of(name)
        calls = sum(sum(ends.values()) for ends in counts.values())
        done = sum(ends.get("done", 0) for ends in counts.values())
        document["machines"][name] = {
            "calls": calls,
            "done": done,
            "refused": calls - done,
            "seconds": round(time.perf_counter() - start, 1),
            "by_call": counts,
        }
        print(f"{name}: {calls:,} calls, {done:,} done, {calls - done:,} refused or interrupted")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
