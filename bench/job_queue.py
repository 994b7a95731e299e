"""Jobs side by side on the GPUs there are, each a process of its own, within a budget of minutes.

A job is a dict with a `name` and the `seconds` it may take. Its process prints JSON objects, one a
line, which become the job's row; a job that fails costs its row only. At the end of the budget the
jobs at work get SIGTERM: they stop at their next step and report what they have.
"""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

GRACE = 20  # seconds between SIGTERM and SIGKILL


def spread(jobs: list[dict], command, gpus: int, per_gpu: int, minutes: float, out: Path) -> list:
    """Run jobs in their order; append each row to `out` as it is done; give all rows of `out`.

    command(job) is the argument list of its process. A GPU takes `per_gpu` jobs at once, but one
    that is `large` alone. None is started that would not end in time, nor one whose row is in `out`
    already; what was left out is printed.
    """
    end = time.monotonic() + 60 * minutes - GRACE
    logs = out.parent / f"{out.stem}.logs"
    logs.mkdir(parents=True, exist_ok=True)
    done = {row["name"] for row in rows(out) if not row.get("cut") and "failed" not in row}
    pending = [job for job in jobs if job["name"] not in done]
    free = [per_gpu] * max(1, gpus)
    working = []
    left_out = []
    while pending or working:
        time_left = end - time.monotonic()
        for job in list(pending):
            gpu = free.index(max(free))
            needs = per_gpu if job.get("large") else 1
            if job["seconds"] > time_left:
                left_out.append(job["name"])
                pending.remove(job)
                continue
            if free[gpu] < needs:
                break
            pending.remove(job)
            free[gpu] -= needs
            print(f"{job['name']}: started on {gpu}, about {job['seconds']:.0f} s", flush=True)
            process = _start(job, command(job), gpu, gpus, logs)
            working.append((job, gpu, needs, process, time.monotonic()))
        if time_left < 0:
            _stop([process for _, _, _, process, _ in working])
        for entry in [entry for entry in working if entry[3].poll() is not None]:
            working.remove(entry)
            job, gpu, needs, process, start = entry
            free[gpu] += needs
            row = job | {"gpu": gpu} | _result(_log(logs, job, "out"), process.returncode)
            row |= {"seconds": round(time.monotonic() - start, 1), "cut": time_left < 0}
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            result = {k: v for k, v in row.items() if k not in job and k != "curve"}
            print(f"{job['name']}: {row['seconds']} s, {json.dumps(result)}", flush=True)
        time.sleep(0.2)
    if left_out:
        print(f"not run, the time was up: {', '.join(left_out)}")
    return rows(out)


def rows(out: Path) -> list[dict]:
    """The last row of each job in a file of results."""
    lines = out.read_text().splitlines() if out.exists() else []
    return list({row["name"]: row for row in map(json.loads, lines)}.values())


def slug(name: str) -> str:
    """A name as a file's."""
    return re.sub(r"[^\w.-]+", "-", name)


def _log(logs: Path, job: dict, kind: str) -> Path:
    return logs / f"{slug(job['name'])}.{kind}.txt"


def _start(job, command, gpu, gpus, logs):
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": str(gpu)} if gpus else {})
    with _log(logs, job, "out").open("w") as out, _log(logs, job, "err").open("w") as err:
        return subprocess.Popen(command, stdout=out, stderr=err, env=environment)


def _stop(processes):
    for process in processes:
        process.send_signal(signal.SIGTERM)
    try:
        for process in processes:
            process.wait(GRACE)
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
            process.wait()


def _result(log: Path, code: int) -> dict:
    rows = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    result = {k: v for part in rows for k, v in part.items()}
    if code:
        errors = log.with_name(log.name.replace(".out.", ".err.")).read_text().strip().splitlines()
        result["failed"] = (errors or ["killed"])[-1][-300:] + f" (exit code {code})"
    return result
