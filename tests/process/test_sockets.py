"""A flood at the learner's socket, in a process that may die of it."""

import subprocess
import sys

FLOOD = """
import sys, time, zmq
from protocol.sockets import bind_learner

context = zmq.Context()
sockets = bind_learner(context, "tcp://127.0.0.1:0", 1 << 20)
peers = zmq.Context()
peer = peers.socket(zmq.DEALER)
peer.connect(sockets.url)
for _ in range(300):
    peer.send(bytes(1000))
sockets.router.poll(5000)
peers.destroy(linger=200)
time.sleep(4.5)  # The first of two heartbeats finds the connection broken.
received = 0
while sockets.router.poll(500):
    sockets.router.recv_multipart()
    received += 1
print(received)
sockets.close()
context.term()
"""


def test_a_peer_that_fills_its_queue_and_dies_does_not_take_the_learner_with_it():
    """libzmq's own heartbeats would abort the process here."""
    result = subprocess.run(
        [sys.executable, "-c", FLOOD], capture_output=True, text=True, timeout=30, check=False
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 64
