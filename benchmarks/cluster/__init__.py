"""A simulated cluster: replicas whose steps take what they were measured or said to take, under traces of requests."""
