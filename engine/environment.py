"""The environment of every process that computes, measured on the work that an engine and a learner do."""

# To be set before a process starts, since OpenMP and the C library read it once.
#
# A thread that waits for work spins for some tens of microseconds, then sleeps. Sleeping at once (PASSIVE alone)
# makes each of the thousands of small operations of a decoding step pay for a wake-up: 8.7 ms instead of 4.9 ms a
# forward pass of 64 tokens (3.7M parameters, two threads). Spinning for long (libgomp's default) makes two processes
# that share cores collapse.
#
# Memory of some megabytes is kept instead of being given back after each operation: getting it again costs a page
# fault every 4 KiB, which made gathering keys and values nearly four times as slow.
#
# oneDNN keeps a compiled product for each size that it has met, 1,024 of them by default; batches of ever other sizes
# made of that 360 MB a learner. What torch keeps beside each, as many too, came to as much again within half an hour.
# Of 64 a training step is no slower.
ACTOR_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "10000",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
}
