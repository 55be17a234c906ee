"""Runs as an MPI rank: all-reduces its own rank plus one with Horovod, and prints who it is and the sum."""

import os
import socket

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import horovod.tensorflow as hvd
import tensorflow as tf

hvd.init()
total = float(hvd.allreduce(tf.fill([1_000_000], hvd.rank() + 1.0), op=hvd.Sum)[-1])
node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
# One write of one line, so that two ranks' lines do not mix.
print(f"node={node} rank={hvd.rank()} local={hvd.local_rank()} size={hvd.size()} sum={total:g}\n", end="", flush=True)
