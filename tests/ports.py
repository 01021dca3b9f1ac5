"""A port for a launch of the tests."""

import contextlib
import random
import socket


def free_port():
    """A port that nobody listens on: DeepSpeed's 29500 may be a training's that runs beside the tests.

    Below those that the kernel gives to connections (Linux: from 32768): none takes it until it is used.
    """
    while True:
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", random.SystemRandom().randrange(10_000, 29_000)))
            return str(free.getsockname()[1])
