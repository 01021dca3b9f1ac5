"""What more machines bring: traffic, and tokens a second with and without sending behind the computing."""

from . import cost, counting

NODES = (1, 2, 4, 8, 16, 32, 64)


def scale(setup, device, utilization, ranks_a_node, network=None):
    """A row for 1 to 64 machines, each rank with the rows it has now, so that the global batch grows with them.

    Args:
        setup: memory.Setup of the run; its ranks are not looked at.
        device: hardware.Device of a rank.
        utilization: (lowest, taken, highest, source) of the model FLOPs utilization.
        ranks_a_node: Devices of a machine.
        network: Bytes a second that a machine sends to others; None is cost.NETWORK.

    Returns:
        [{nodes, ranks, tokens_a_step, sent_bytes, sending_seconds, computing_seconds, tokens_per_second: [least, most],
        efficiency: [least, most]}]: least where all sending waits for computing, most where what may hide behind it
        does: cost.Traffic. Efficiency is against one machine that computes only.

    Raises:
        ValueError: The device's peak is unknown.
    """
    if not device.peak_flops:
        raise ValueError(f"{device.name}: its peak is unknown, and with it how fast it computes.")
    flops = counting.flops(setup.config, setup.block_size)
    total, mine = counting.count(setup.config).total, setup.micro_batch * setup.accumulation * setup.block_size
    rows = []
    for nodes in NODES:
        ranks = nodes * ranks_a_node
        sent = cost.traffic(setup, total, ranks)
        found = cost.estimate(
            flops, mine * ranks, None, device, ranks, utilization, nodes=nodes, sent=sent, network=network
        )
        computing, sending = mine * flops.model / (device.peak_flops * utilization[1]), found["network_seconds_a_step"]
        seconds = computing + sending, found["seconds_a_step"]
        rows.append(
            {
                "nodes": nodes,
                "ranks": ranks,
                "tokens_a_step": mine * ranks,
                "sent_bytes": sum(sent),
                "sending_seconds": sending,
                "computing_seconds": computing,
                "tokens_per_second": [mine * ranks / each for each in seconds],
                "efficiency": [computing / each for each in seconds],
            }
        )
    return rows
