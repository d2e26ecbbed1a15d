"""What a rank of the pool does: take a job, join its world, run it, answer, forget."""

import faulthandler
import gc
import os
import pickle
import signal
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection

from tests.distributed import fork_server, worker_state

# What a rank says when it has left the world of its job and touches nothing of it any more.
LEFT = "left"


@dataclass(frozen=True)
class Place:
    """A rank's place in a job."""

    rank: int
    world_size: int
    directory: str  # of this job: the rendezvous, and the stacks of ranks that hang
    timeout_s: float
    import_path: list[str]


@dataclass(frozen=True)
class Answer:
    """What became of a rank's call: a pickled result, or a traceback."""

    result: bytes | None
    traceback: str
    ended_s: float  # on the machine's monotonic clock
    died: bool = False  # without an answer of its own


def stack_file(directory: str, rank: int) -> str:
    """File to which a rank writes its Python stack when it gets SIGUSR1."""
    return os.path.join(directory, f"stack{rank}")


def serve(pipe: Connection) -> None:
    """Take jobs until the other end of ``pipe`` is gone."""
    import torch

    torch.set_num_threads(1)
    # The test machine's own name need not resolve.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    # Gloo worlds compute on the CPU, whatever else the machine has.
    os.environ["MEGATRON_DEVICE"] = "cpu"
    home = worker_state.take()
    worker_state.reset(home)
    gc.freeze()  # the collection after every job looks at that job's objects only
    while True:
        try:
            place = pipe.recv()
            call = pipe.recv_bytes()
            fork_server.share_import_path(place.import_path)
            with open(stack_file(place.directory, place.rank), "w") as stack:
                faulthandler.register(signal.SIGUSR1, file=stack)
                answer = _run(place, call)
                pipe.send(answer)
                if answer.result is not None:
                    # Nobody leaves while another may still be connecting to it or waiting for its last
                    # message. A rank that failed leaves at once: that wakes those who wait for it.
                    pipe.recv()
                faulthandler.unregister(signal.SIGUSR1)
            worker_state.reset(home)
            pipe.send(LEFT)
        except (EOFError, OSError):  # the test process is gone
            return


def _run(place: Place, call: bytes) -> Answer:
    import torch.distributed as dist

    os.environ |= {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_RANK": str(place.rank),
        "LOCAL_WORLD_SIZE": str(place.world_size),
    }
    try:
        function, args, kwargs = pickle.loads(call)
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(os.path.join(place.directory, "store"), place.world_size),
            rank=place.rank,
            world_size=place.world_size,
            timeout=timedelta(seconds=place.timeout_s),
        )
        dist.barrier()  # so that a rank that fails at once is connected to all others, who then notice
        # Plain pickle: results are copied, no shared memory outlives the job.
        return Answer(pickle.dumps(function(*args, **kwargs)), "", time.monotonic())
    except BaseException:
        return Answer(None, traceback.format_exc(), time.monotonic())
