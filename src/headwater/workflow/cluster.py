"""A Ray cluster as a run needs it; the only module that imports Ray.

Ray is imported when it is asked for: everything else works without it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from headwater.config.compute import Compute
from headwater.errors import InputError, StageError
from headwater.workflow.messages import Done, Failed, WorkerSetup
from headwater.workflow.nodes import look, require_alike

_REACH_SECONDS = 10.0
_LOOK_SECONDS = 120.0
#: Ray itself: no telemetry, the current Ray Train, no folder of its own to work in, and how often
#: it looks after ranks.
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}


def connected(address: str, stack: ExitStack) -> Any:
    """The ray package, connected; `stack` takes the connection down, unless it was there before."""
    os.environ.update(RAY_ENVIRONMENT)
    try:
        import ray
    except ImportError:
        raise InputError(
            f"--ray {address}: the package ray is not installed; expected it for runs on a "
            "cluster: pip install 'headwater[ray]'"
        ) from None
    _require_reachable(address)
    if ray.is_initialized():  # by the program that calls us, to which it belongs
        return ray
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        options["include_dashboard"] = False
    try:
        ray.init(address, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(
            f"--ray {address}: no cluster answers there ({last_line(error)}); expected one that "
            "this machine is a node of: start it with `ray start --head`, join it with `ray start "
            "--address=HOST:PORT`, or use --ray local"
        ) from None
    stack.callback(ray.shutdown)
    return ray


def _require_reachable(address: str) -> None:
    """Ray ends the process that asks for an address where nobody listens: look before."""
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise InputError(
            f"--ray {address}: expected auto, local or HOST:PORT, as `ray start --head` prints it; "
            "to use a cluster from outside, start the run on one of its nodes"
        )
    try:
        socket.create_connection((host, int(port)), timeout=_REACH_SECONDS).close()
    except OSError as error:
        raise InputError(
            f"--ray {address}: nobody listens there ({error}); expected the address that "
            "`ray start --head` printed: check that the cluster runs and the port is open"
        ) from None


def uses_gpu(ray: Any, compute: Compute) -> bool:
    """Whether stages ask for GPUs; `auto` does where the cluster has any."""
    return compute.device == "cuda" or (
        compute.device == "auto" and ray.cluster_resources().get("GPU", 0) >= 1
    )


def require_room(ray: Any, ranks: int, cpus: int, gpu: bool) -> None:
    """Raise InputError where the cluster has not what one stage takes: it would wait for ever.

    ranks: processes of a stage, each with `cpus` cores and, with `gpu`, a GPU.
    """
    if ranks > 1:
        try:
            import ray.train as _train  # noqa: F401 - its own dependencies
        except ImportError as error:
            raise InputError(
                f"compute.ranks={ranks}: Ray Train cannot be imported ({last_line(error)}); "
                "expected all that it needs: pip install 'headwater[ray]', on every node"
            ) from None
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    settings = {"CPU": "compute.threads", "GPU": "compute.device"}
    for name, each in {"CPU": cpus, "GPU": int(gpu)}.items():
        largest = max((node.get(name, 0) for node in nodes), default=0)
        if largest < each:
            raise InputError(
                f"the largest node of the cluster has {largest:g} {name}s and a process of a stage "
                f"takes {each}; expected a node of at least that: add one, or change "
                f"{settings[name]}"
            )
        fit = sum(int(node.get(name, 0) // each) for node in nodes) if each else ranks
        if fit < ranks:
            raise InputError(
                f"compute.ranks={ranks} takes {each} {name}s for each rank, and the cluster has "
                f"room for {fit}; expected room for all of them: add nodes, or lower it"
            )


def require_nodes(ray: Any, setup: WorkerSetup, folder: Path, environment: dict[str, str]) -> None:
    """Raise InputError where a node does not see the run folder, or other code than this one."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = look(setup.run_dir, folder, setup.verifier)
    looking = {}
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("CPU", 0) > 0:
            pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            remote = ray.remote(look).options(
                num_cpus=0, scheduling_strategy=pinned, runtime_env={"env_vars": environment}
            )
            looking[node["NodeID"]] = remote.remote(setup.run_dir, folder, setup.verifier)
    for node_id, reference in looking.items():
        try:
            seen = ray.get(reference, timeout=_LOOK_SECONDS)
        except ray.exceptions.TaskUnschedulableError:  # it has left meanwhile
            continue
        except ray.exceptions.RayError as error:
            raise InputError(
                f"node {node_id} runs nothing of headwater's ({last_line(error)}); expected the "
                "same headwater on every node: install it there, or take the node out"
            ) from None
        require_alike(seen, here, setup.run_dir, node_id)


def serve(ray: Any, service: type, environment: dict[str, str], *arguments: Any) -> Any:
    """A process on this machine that holds a `service`, made with these arguments."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote = ray.remote(service).options(
        num_cpus=0,
        scheduling_strategy=here,
        max_restarts=0,
        runtime_env={"env_vars": environment},
    )
    return remote.remote(*arguments)


def fetch(reference: Any) -> Any:
    """What a reference stands for, in a task. Where the run is gone, the process ends at once."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayActorError:
        os._exit(1)


def on_ranks(
    loop: Callable[[dict[str, Any]], Done | Failed],
    argument: dict[str, Any],
    *,
    name: str,
    storage: Path,
    ranks: int,
    resources: Mapping[str, float],
    environment: dict[str, str],
    retries: int,
) -> Done | Failed:
    """What `loop(argument)` returns on rank 0 of as many processes, in one process group.

    All of them are started again, up to `retries` times, where one is lost or raises; after that
    StageError. resources: of each rank.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    trainer = TorchTrainer(
        loop,
        train_loop_config=argument,
        # what is offloaded to the host's memory is told over gloo
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if "GPU" in resources else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=ranks, use_gpu="GPU" in resources, resources_per_worker=dict(resources)
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=retries),
            worker_runtime_env={"env_vars": environment},
        ),
    )
    try:
        reply: Done | Failed = trainer.fit().return_value
    except TrainingFailedError as error:
        raise StageError(last_line(error)) from None
    return reply


def last_line(error: BaseException) -> str:
    """The last line of what an error says: Ray puts whole tracebacks before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
