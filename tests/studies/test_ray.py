from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from executor_jobs import count, die, leave, stay
from executor_seen import Seen, wait_for

from hybridvit.studies.cells import run_study
from hybridvit.studies.executors import Job
from hybridvit.studies.executors.choice import choose
from hybridvit.studies.executors.ray import Ray
from hybridvit.studies.grid import read_study
from hybridvit.studies.status import read_json

HERE = Path(__file__).parent
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster of this machine, on loopback, with a node that claims to have a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # else not on loopback
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
        ray = pytest.importorskip("ray", reason="Ray is not installed: extra ray")
        from ray.cluster_utils import Cluster

        head = {**NODE, "num_gpus": 1, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


def test_jobs_end_with_their_codes_and_in_their_order(cluster: Any, tmp_path: Path) -> None:
    jobs = [
        Job("fails", leave, (3,)),
        Job("raises", stay, (tmp_path, "no/such/folder", 0.0)),
        Job("dies", die, ()),
        Job("long", stay, (tmp_path, "long", 2.0)),
        Job("last", stay, (tmp_path, "last", 0.1), after="long"),
    ]
    seen = Seen()
    executor = Ray({"address": cluster.address, "gpus": "0"}, threads=1)
    assert executor.room() == 1
    executor.run(jobs, watch=seen.watch, ended=seen.ended)
    assert seen.codes == {"fails": 3, "raises": 1, "dies": -signal.SIGKILL, "long": 0, "last": 0}
    assert {"long", "dies"} <= seen.running
    last, long = ((tmp_path / name).read_text().split() for name in ("last", "long"))
    assert float(last[0]) > float(long[1])
    assert last[-1] == "1"  # threads


def test_two_jobs_share_a_gpu(cluster: Any, tmp_path: Path) -> None:
    options = {"address": cluster.address, "gpus": "0.5", "cpus": "0.5"}
    executor = Ray(options, threads=1)
    assert executor.room() == 2
    jobs = [Job(name, stay, (tmp_path, name, 3.0)) for name in "ab"]
    executor.run(jobs, watch=lambda names: None, ended=lambda name, code: None)
    a, b = ((tmp_path / name).read_text().split() for name in "ab")
    assert float(a[0]) < float(b[1])
    assert float(b[0]) < float(a[1])
    assert (a[2], b[2]) == ("0", "0")


def test_ctrl_c_lets_jobs_save_and_leaves_none_behind(cluster: Any, tmp_path: Path) -> None:
    args = [f"address={cluster.address}", "gpus=0"]
    driver = [sys.executable, str(HERE / "executor_driver.py"), "ray", str(tmp_path), *args]
    with subprocess.Popen(driver) as process:
        wait_for(lambda: len(list(tmp_path.glob("[0-9]"))) == 1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert [path.name for path in tmp_path.glob("*.saved")] == ["0.saved"]
    before = (tmp_path / "0").read_text()
    executor = Ray({"address": cluster.address, "gpus": "0"}, threads=1)  # it has room again
    executor.run([Job("a", stay, (tmp_path, "a", 1.2))], watch=print, ended=print)
    assert (tmp_path / "0").read_text() == before


STUDY = """
title: T
question: Q
config: digits.yaml
axes:
  stem: {slow: {plugins: ["slow_parts:register"], stem: {name: slow}}}
seeds: [0, 1, 2]
"""
TINY = ["encoder.args.dim=8", "encoder.args.depth=1", "encoder.args.heads=1"]


def test_a_study_is_completed_though_a_node_dies(cluster: Any, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(STUDY)
    study = read_study(tmp_path, [*TINY, "train.epochs=2", "train.log_every=2"])
    out = tmp_path / "out"
    node = cluster.add_node(**NODE)
    executor = Ray({"address": cluster.address, "gpus": "0"}, threads=1)
    assert executor.room() == 2

    def kill() -> list[Path]:
        wait_for(lambda: len(list(out.glob("*/metrics.jsonl"))) == 2)
        cluster.remove_node(node, allow_graceful=False)
        return list(out.glob("*/metrics.jsonl"))

    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill)
        assert run_study(study, out, executor=executor) == []
        killed.result()
    assert executor.room() == 1
    records = [read_json(out / cell.name / "run.json") or {} for cell in study.cells]
    assert [record["status"] for record in records] == ["complete"] * 3


def test_a_job_of_a_dead_node_goes_on_elsewhere(cluster: Any, tmp_path: Path) -> None:
    node = cluster.add_node(**{**NODE, "num_cpus": 2})
    executor = Ray({"address": cluster.address, "gpus": "0", "cpus": "2"}, threads=1)
    seen, file = Seen(), tmp_path / "count"

    def watch(names: list[str]) -> None:
        if file.exists() and file.read_text() == "20 1" and node in cluster.worker_nodes:
            cluster.add_node(**{**NODE, "num_cpus": 2})
            cluster.remove_node(node, allow_graceful=False)

    executor.run([Job("count", count, (file, 60))], watch=watch, ended=seen.ended)
    assert seen.codes == {"count": 0}
    assert file.read_text() == "60 2"  # in two calls


def test_what_is_missing_or_wrong_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(*args: str) -> None:
        choose("ray", args, threads=1, slots=None, out=tmp_path)

    with pytest.raises(ValueError, match="ray has no such option, did you mean 'gpus'"):
        chosen("gpu=1")
    with pytest.raises(ValueError, match="gpus=half should be a number, 0 or more"):
        chosen("gpus=half")
    with pytest.raises(ValueError, match="cpus=-1 should be a number, 0 or more"):
        chosen("cpus=-1")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'hybridvit\[ray\]'"):
        chosen("gpus=0.5")


def test_no_cluster_is_said_at_once() -> None:
    pytest.importorskip("ray", reason="Ray is not installed: extra ray")
    with pytest.raises(ValueError, match=r"no Ray cluster at '127.0.0.1:9' .*refused"):
        Ray({"address": "127.0.0.1:9"}, 1)
    with pytest.raises(ValueError, match="no Ray cluster at 'there:port'"):
        Ray({"address": "there:port"}, 1)
