"""A process with an executor, for tests that stop it: EXECUTOR FOLDER [KEY=VALUE ...]."""

from __future__ import annotations

import sys
from pathlib import Path

from executor_jobs import count

from hybridvit.studies.executors import Job
from hybridvit.studies.executors.choice import choose

if __name__ == "__main__":
    name, folder, *args = sys.argv[1:]
    executor = choose(name, args, threads=1, slots=None, out=Path(folder))
    jobs = [Job(str(i), count, (Path(folder) / str(i), 10_000)) for i in range(4)]
    try:
        executor.run(jobs, watch=lambda running: None, ended=lambda job, code: print(job, code))
    except KeyboardInterrupt:
        sys.exit(130)
