"""How OpenMP's threads wait, measured on the work that an engine does."""

# To be set in a process's environment before torch is imported. A thread that waits for work spins for some tens
# of microseconds, then sleeps. Sleeping at once (PASSIVE alone) makes each of the thousands of small operations
# of a decoding step pay for a wake-up: 8.7 ms instead of 4.9 ms a forward pass of 64 tokens (3.7M parameters, two
# threads). Spinning for long (libgomp's default) makes two processes that share cores collapse.
THREAD_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}
