"""What ``hstu-plan`` counts: memory, bytes sent and time of a training step, and the cluster that fits."""
