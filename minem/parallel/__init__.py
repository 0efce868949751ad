"""Several processes that train one model: ranks, launch, sharding, signals."""
