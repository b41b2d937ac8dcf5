"""Many machines: calls of one function as Ray tasks or as Slurm jobs.

A call writes what it makes where every machine sees it, and called again goes on from there. So a
call whose worker dies is made again and costs no more than a kill of a local run does.
"""

import os
import pkgutil
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxinv.errors import UserError

RETRIES = 3  # of a call whose worker died
POLL = 0.5  # seconds between two looks at the calls


class WorkerDied(Exception):
    """The process of a call is gone, with its machine or without it; the message says how."""


class Executor(NamedTuple):
    """What the two have in common. A handle is theirs."""

    kind: str
    submit: Callable[[tuple], Any]  # arguments of a call -> handle
    is_finished: Callable[[Any], bool]
    result: Callable[[Any], Any]  # raises WorkerDied, and what the call raised
    cancel: Callable[[Any], None]


def start(kind: str, function: str, resources: Mapping[str, Any], folder: Path) -> Executor:
    """Connects to the machines that will call a function.

    Args:
      kind: a name in `EXECUTORS`.
      function: `package.module:name`; called in this process's working directory.
      resources: what one call needs, in the executor's own words.
      folder: where the executor may leave its files; nothing is written yet.

    Raises:
      UserError: the executor is not there or refuses the resources.
    """
    directory = os.getcwd()

    def make(*arguments):
        os.chdir(directory)
        try:
            return pkgutil.resolve_name(function)(*arguments)
        except UserError as error:  # a result: what becomes of exceptions is the executor's own
            return error

    return EXECUTORS[kind](make, resources, folder)


def run(
    executor: Executor,
    calls: Sequence[tuple],
    watch: Callable[[], None],
    report: Callable[[str], None],
) -> list:
    """Makes every call, each where there is room for it, and waits for all.

    Args:
      executor: of the function.
      calls: the arguments of each.
      watch: called twice a second.
      report: called with a line when a call is made again.

    Returns:
      What the calls returned, in their order.

    Raises:
      UserError: a call raised one, or its worker died again and again.
    """
    results: dict[int, Any] = {}
    pending = []  # index of the call, how often its worker died, handle
    try:
        pending += [(index, 0, executor.submit(call)) for index, call in enumerate(calls)]
        while pending:
            time.sleep(POLL)
            watch()
            for entry in [e for e in pending if executor.is_finished(e[2])]:
                pending.remove(entry)
                index, deaths, handle = entry
                try:
                    results[index] = executor.result(handle)
                except WorkerDied as death:
                    if deaths == RETRIES:
                        raise UserError(
                            f"--executor {executor.kind}: a worker died {deaths + 1} times on one "
                            f"cell ({death}); see its logs, or ask for more with --resources; "
                            "the same command goes on from what is finished"
                        ) from None
                    report(f"a worker died ({death}); its cell goes on in another")
                    pending.append((index, deaths + 1, executor.submit(calls[index])))
    finally:
        for _, _, handle in pending:
            executor.cancel(handle)
    return [results[index] for index in range(len(calls))]


def _unless_error(result: Any) -> Any:
    """Raises the UserError that a call returned."""
    if isinstance(result, UserError):
        raise result
    return result


def _ray(function: Callable, resources: Mapping[str, Any], folder: Path) -> Executor:
    """Tasks of the running Ray cluster (RAY_ADDRESS), or of one of this machine's own."""
    try:
        import ray
    except ImportError:
        raise UserError("--executor ray: not installed; pip install 'jaxinv[ray]'") from None
    try:
        # A process per task: JAX does not let go of the devices that were another task's.
        task = ray.remote(max_calls=1, max_retries=0, name="jaxinv-cell", **resources)(function)
    except (TypeError, ValueError) as error:
        raise UserError(f"--resources: Ray says: {error}") from None
    if not ray.is_initialized():
        ray.init(include_dashboard=False)

    def result(handle):
        try:
            return _unless_error(ray.get(handle))
        except ray.exceptions.RayTaskError:
            raise  # of the function: it would come again
        except ray.exceptions.RayError as error:
            raise WorkerDied(type(error).__name__) from None

    return Executor(
        kind="ray",
        submit=lambda call: task.remote(*call),
        is_finished=lambda handle: bool(ray.wait([handle], timeout=0)[0]),
        result=result,
        cancel=lambda handle: ray.cancel(handle, force=True),
    )


def _slurm(function: Callable, resources: Mapping[str, Any], folder: Path) -> Executor:
    """Jobs of the Slurm cluster whose `sbatch` is in the path."""
    # Else its import sets logging up anew, which closes every handler, absl's with its stream.
    os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")
    try:
        import submitit
    except ImportError:
        raise UserError("--executor slurm: not installed; pip install 'jaxinv[slurm]'") from None
    if shutil.which("sbatch") is None:
        raise UserError("--executor slurm: there is no sbatch here; start it where Slurm is")
    executor = submitit.AutoExecutor(folder=folder / "slurm", cluster="slurm")
    try:
        # Its own default is five minutes.
        executor.update_parameters(**{"name": "jaxinv-cell", "timeout_min": 240, **resources})
    except (NameError, TypeError, ValueError) as error:
        raise UserError(f"--resources: submitit says: {error}") from None

    def result(job):
        try:
            return _unless_error(job.result())
        except submitit.core.utils.FailedJobError:
            raise  # of the function: it would come again
        except submitit.core.utils.UncompletedJobError:
            raise WorkerDied(f"job {job.job_id}, {job.state.lower()}") from None

    return Executor(
        kind="slurm",
        submit=lambda call: executor.submit(function, *call),
        is_finished=lambda job: job.done(),
        result=result,
        cancel=lambda job: job.cancel(),
    )


EXECUTORS = {"ray": _ray, "slurm": _slurm}
